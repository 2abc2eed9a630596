//! `pswitch train`.

mod curve;
mod log;
mod text;

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use pswitch_controller::{TaskState, TaskStatus};
use pswitch_train::TaskConfig;
use serde::Serialize;

use self::curve::Curve;
use self::log::Log;
use crate::args::{Format, Named, ServerAddress, TrainCommand};
use crate::client::Client;
use crate::exit::{Classify as _, Failure, print};

/// How long it is waited for a task that is submitted to be prepared: most mistakes are found on the way.
const PREPARED_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub(crate) fn run(command: &TrainCommand) -> anyhow::Result<()> {
    match command {
        TrainCommand::Submit(args) => {
            let config = configuration(&args.config).class(Failure::Input)?;
            let task = submitted(&client(&args.server), &args.name, &config)?;
            tell(&task, task.state != TaskState::Failed, "it cannot be trained so")
        }
        TrainCommand::List(args) => {
            let tasks = client(&args.server).tasks()?;
            print_as(args.format, &tasks, || text::table(&tasks))
        }
        TrainCommand::Show(args) => {
            let task = client(&args.task.server).task(&args.task.name)?;
            print_as(args.format, &task, || text::facts(&task))
        }
        TrainCommand::Pause(args) => command_task(args, "pause"),
        TrainCommand::Resume(args) => command_task(args, "resume"),
        TrainCommand::Stop(args) => {
            let command = if args.discard { "discard" } else { "stop" };
            let task = client(&args.task.server).command_task(&args.task.name, command)?;
            tell(&task, task.state.is_over(), "make its folder writable and stop it again, or with --discard")
        }
        TrainCommand::Plot(args) => {
            let log = Log::open(&args.log).class(Failure::Input)?;
            Ok(args.out.write(&Curve::new(&args.log, &log))?)
        }
    }
}

fn client(address: &ServerAddress) -> Client {
    Client::new(&address.server, None)
}

fn command_task(task: &Named, command: &str) -> anyhow::Result<()> {
    print(&text::told(&client(&task.server).command_task(&task.name, command)?))
}

/// What a task came to: an error, with what to do, unless that was wanted.
fn tell(task: &TaskStatus, is_wanted: bool, advice: &str) -> anyhow::Result<()> {
    let told = text::told(task);
    if is_wanted {
        print(&told)
    } else {
        Err(anyhow!("{}; {advice}", told.trim_end())).class(Failure::Refused)
    }
}

/// What became of a task that the server has taken.
fn submitted(client: &Client, name: &str, config: &str) -> anyhow::Result<TaskStatus> {
    let mut task = client.submit_task(name, config)?;
    let begun = Instant::now();
    while task.state == TaskState::Preparing && begun.elapsed() < PREPARED_WITHIN {
        thread::sleep(LOOK_EVERY);
        task = client.task(name)?;
    }
    Ok(task)
}

fn print_as(format: Format, value: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
    match format {
        Format::Json => print(&format!("{}\n", serde_json::to_string_pretty(value)?)),
        Format::Table => print(&text()),
    }
}

/// What a server is sent: the configuration in a file, with every path absolute, as the server's folder is another.
fn configuration(path: &Path) -> anyhow::Result<String> {
    let shown = path.display();
    // Paths in it are taken from the file's folder: from an absolute one they are absolute.
    let absolute = std::path::absolute(path).with_context(|| format!("{shown} is no path"))?;
    let config = TaskConfig::open(&absolute).with_context(|| format!("{shown} is no training task"))?;
    serde_json::to_string(&config).with_context(|| format!("{shown} cannot be sent"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::thread;

    use pswitch_train::DataConfig;

    use super::*;

    const CONFIG: &str = "
program: models/step
optimizer: {kind: adamw, lr: 1e-3, eps: 1e-12}
data: {files: [x.npy, /data/y.npy], batch_size: 8}
length: {steps: 100}
checkpoint: {folder: ../kept, every_steps: 10}
seed: 18446744073709551615
";

    #[test]
    fn a_configuration_is_sent_with_absolute_paths() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("task.yaml");
        fs::write(&path, CONFIG).unwrap();
        let sent = TaskConfig::from_yaml(&configuration(&path).unwrap()).unwrap();
        let at = |name: &str| folder.path().join(name);
        assert_eq!(sent.program, at("models/step"));
        let DataConfig::Files { files, .. } = &sent.data else { panic!("{:?}", sent.data) };
        assert_eq!(*files, [at("x.npy"), "/data/y.npy".into()]);
        assert_eq!(sent.checkpoint.as_ref().unwrap().folder, at("../kept"));
        // Nothing else changes on the way.
        let mut expected = TaskConfig::from_yaml(CONFIG).unwrap();
        expected.program.clone_from(&sent.program);
        expected.data = sent.data.clone();
        expected.checkpoint.clone_from(&sent.checkpoint);
        assert_eq!(sent, expected);
    }

    #[test]
    fn what_is_no_configuration_is_told_before_anything_is_sent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("task.yaml");
        for (text, says) in [
            ("{", "line 2 column 1"),
            ("program: a", "missing field `optimizer`"),
            (&CONFIG.replace("1e-3", "-1"), "`optimizer.lr` is -1"),
        ] {
            fs::write(&path, text).unwrap();
            let error = format!("{:#}", configuration(&path).unwrap_err());
            assert!(error.contains("task.yaml is no training task: ") && error.contains(says), "{error}");
        }
        let error = format!("{:#}", configuration(Path::new("/nowhere.yaml")).unwrap_err());
        assert!(error.contains("cannot read /nowhere.yaml"), "{error}");
    }

    /// Whether a request has all of its head and of the body that its head tells of.
    fn is_whole(request: &[u8]) -> bool {
        let text = String::from_utf8_lossy(request).to_ascii_lowercase();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
        body.len() >= length.unwrap_or(0)
    }

    /// A server that answers one request, and what it was asked.
    fn answers(status: &str, body: &str) -> (String, thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/", listener.local_addr().unwrap());
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let asked = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut asked, mut piece) = (Vec::new(), [0; 4096]);
            while !is_whole(&asked) {
                let read = stream.read(&mut piece).unwrap();
                assert!(read > 0, "the request broke off");
                asked.extend_from_slice(&piece[..read]);
            }
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8(asked).unwrap()
        });
        (address, asked)
    }

    #[test]
    fn every_request_has_its_path() {
        type Ask = fn(&Client) -> anyhow::Result<TaskStatus>;
        let asks: [(&str, Ask); 4] = [
            ("GET /v2/training/tasks/t HTTP/1.1", |client| client.task("t")),
            ("POST /v2/training/tasks/t HTTP/1.1", |client| client.submit_task("t", "{\"seed\": {}}")),
            ("POST /v2/training/tasks/t/pause HTTP/1.1", |client| client.command_task("t", "pause")),
            ("POST /v2/training/tasks/t/stop HTTP/1.1", |client| client.command_task("t", "stop")),
        ];
        let task = serde_json::to_string(&text::example()).unwrap();
        for (line, ask) in asks {
            let (address, asked) = answers("200 OK", &task);
            let answer = ask(&Client::new(&address, None)).unwrap();
            assert_eq!(serde_json::to_string(&answer).unwrap(), task);
            let asked = asked.join().unwrap();
            assert!(asked.starts_with(line), "{asked}");
            assert_eq!(
                asked.ends_with("{\"seed\": {}}"),
                line.contains("tasks/t HTTP") && line.starts_with("POST")
            );
        }
        let (address, asked) = answers("200 OK", &format!("[{task}]"));
        assert_eq!(Client::new(&address, None).tasks().unwrap().len(), 1);
        assert!(asked.join().unwrap().starts_with("GET /v2/training/tasks HTTP/1.1"));
    }

    #[test]
    fn refusals_say_why() {
        let (address, asked) = answers("404 Not Found", r#"{"error": "unknown training task 't'"}"#);
        let error = format!("{:#}", Client::new(&address, None).task("t").unwrap_err());
        assert_eq!(error, "the server refused: 404 Not Found: unknown training task 't'");
        asked.join().unwrap();
        let (address, asked) = answers("200 OK", "{}");
        let error = format!("{:#}", Client::new(&address, None).task("t").unwrap_err());
        assert!(error.starts_with("the training task is not what was expected: "), "{error}");
        asked.join().unwrap();
    }
}
