//! The commands that documents tell readers to type exist, with the options that they name.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::CommandFactory;

use crate::metadata::Metadata;
use crate::root::Root;
use crate::{Arguments, commands};

/// Checks all documents; the binary `pswitch` has to be built.
pub(crate) fn check(root: &Root, metadata: &Metadata) -> Result<()> {
    let mut help = Helps { root, known: BTreeMap::new() };
    let mut wrong = Vec::new();
    let mut checked = 0;
    for document in documents(root, metadata) {
        let text =
            fs::read_to_string(&document).with_context(|| format!("cannot read {}", document.display()))?;
        let shown = document.strip_prefix(root.path()).unwrap_or(&document).display().to_string();
        for (line, command) in commands_in(&text) {
            match wrong_with(&command, metadata, &mut help)? {
                Verdict::Right => checked += 1,
                Verdict::Wrong(reason) => wrong.push(format!("{shown}:{line}: {reason}")),
                Verdict::NotOurs => {}
            }
        }
    }
    if !wrong.is_empty() {
        bail!("commands in documents that do not exist:\n  {}", wrong.join("\n  "));
    }
    println!("{checked} commands in documents exist");
    Ok(())
}

fn documents(root: &Root, metadata: &Metadata) -> Vec<PathBuf> {
    let top =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "python/README.md"].map(|name| root.join(name));
    let crates = metadata.own().map(|package| package.folder.join("README.md"));
    top.into_iter().chain(crates).filter(|path| path.exists()).collect()
}

/// Line number and words of every command in a fenced block of shell, comments and pipes left out.
fn commands_in(text: &str) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let mut in_shell = false;
    let mut in_block = false;
    let mut joined = String::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(language) = line.strip_prefix("```") {
            in_shell = !in_block && ["sh", "bash", "shell", "console"].contains(&language);
            in_block = !in_block;
            continue;
        }
        if !in_shell {
            continue;
        }
        joined += line.trim_start_matches("$ ");
        if joined.ends_with('\\') {
            joined.pop();
            joined.push(' ');
            continue;
        }
        let words = joined.split_whitespace().map(|word| word.trim_matches(['\'', '"']).to_owned());
        let words: Vec<_> =
            words.take_while(|word| !word.starts_with('#') && word != "|" && word != "&&").collect();
        if !words.is_empty() {
            found.push((number + 1, words));
        }
        joined.clear();
    }
    found
}

enum Verdict {
    Right,
    Wrong(String),
    NotOurs,
}

fn wrong_with(command: &[String], metadata: &Metadata, help: &mut Helps) -> Result<Verdict> {
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    Ok(match words.as_slice() {
        ["cargo", "xtask", rest @ ..] => {
            let mut tasks = Arguments::command();
            let Some(task) = rest.first().and_then(|name| tasks.find_subcommand_mut(name)) else {
                return Ok(Verdict::Wrong(format!("there is no '{}'", command.join(" "))));
            };
            options(rest, &task.render_long_help().to_string())
        }
        ["cargo", "run" | "bench" | "test", rest @ ..] => named_by_cargo(rest, metadata),
        [program, rest @ ..] if Path::new(program).file_name().is_some_and(|name| name == "pswitch") => {
            match rest.first() {
                Some(name) if !name.starts_with('-') => match help.of_pswitch(name, rest.get(1).copied())? {
                    Some(text) => options(rest, &text),
                    None => Verdict::Wrong(format!("there is no '{}'", command.join(" "))),
                },
                _ => Verdict::Right,
            }
        }
        ["pswitch-export", rest @ ..] => options(rest, &help.of_export()?),
        _ => Verdict::NotOurs,
    })
}

/// Whether all options in `words` stand in the help text.
fn options(words: &[&str], help: &str) -> Verdict {
    for word in words.iter().filter(|word| word.starts_with("--") && word.len() > 2) {
        let name = word.split('=').next().unwrap_or(word);
        let known = help.split(|c: char| !(c.is_alphanumeric() || c == '-')).any(|known| known == name);
        if !known {
            return Verdict::Wrong(format!("there is no option '{name}' here"));
        }
    }
    Verdict::Right
}

/// Packages and examples that a call of cargo names.
fn named_by_cargo(words: &[&str], metadata: &Metadata) -> Verdict {
    for pair in words.windows(2) {
        let known = match pair[0] {
            "-p" | "--package" => metadata.own().any(|package| package.name == pair[1]),
            "--example" => metadata.own().any(|package| package.examples.iter().any(|name| name == pair[1])),
            _ => true,
        };
        if !known {
            return Verdict::Wrong(format!("there is no '{} {}'", pair[0], pair[1]));
        }
    }
    Verdict::Right
}

/// Help texts, asked for once.
struct Helps<'a> {
    root: &'a Root,
    known: BTreeMap<String, Option<String>>,
}

impl Helps<'_> {
    /// The help of a subcommand of the binary, or of the one within it that follows; None if there is none.
    fn of_pswitch(&mut self, subcommand: &str, next: Option<&str>) -> Result<Option<String>> {
        let help = self.of_subcommand(subcommand)?;
        match (&help, next) {
            (Some(text), Some(inner)) if text.contains("\nCommands:") && !inner.starts_with('-') => {
                self.of_subcommand(&format!("{subcommand} {inner}"))
            }
            _ => Ok(help),
        }
    }

    fn of_subcommand(&mut self, subcommand: &str) -> Result<Option<String>> {
        if let Some(known) = self.known.get(subcommand) {
            return Ok(known.clone());
        }
        let binary = self.root.target().join("debug/pswitch");
        let output = Command::new(&binary)
            .args(subcommand.split(' '))
            .arg("--help")
            .output()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        let text = output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned());
        self.known.insert(subcommand.to_owned(), text.clone());
        Ok(text)
    }

    fn of_export(&self) -> Result<String> {
        commands::output(commands::python(self.root).args(["-m", "pswitch.cli", "--help"]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Package;

    fn verdict(line: &str) -> Verdict {
        let mut metadata = Metadata::default();
        let package = Package {
            name: "pswitch-model".to_owned(),
            is_own: true,
            examples: vec!["inspect".to_owned()],
            ..Package::default()
        };
        metadata.0.insert("model".to_owned(), package);
        let root = Root::of_this_repository();
        let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        let mut help = Helps { root: &root, known: BTreeMap::new() };
        help.known
            .insert("serve".to_owned(), Some("  --http <ADDRESS>  [default: 127.0.0.1:8000]".to_owned()));
        help.known.insert("swerve".to_owned(), None);
        help.known.insert("bench".to_owned(), Some("\nCommands:\n  switch\n\n  --out <FOLDER>".to_owned()));
        help.known.insert("bench switch".to_owned(), Some("  --device <DEVICE>".to_owned()));
        help.known.insert("bench swish".to_owned(), None);
        wrong_with(&words, &metadata, &mut help).unwrap()
    }

    #[test]
    fn commands_are_taken_from_blocks_of_shell() {
        let text = "```sh\n$ cargo xtask demo   # two minutes\ncurl a \\\n  b | jq\n```\n```rust\nlet a = 1;\n```\ncargo no\n";
        let found: Vec<_> =
            commands_in(text).into_iter().map(|(line, words)| (line, words.join(" "))).collect();
        assert_eq!(found, [(2, "cargo xtask demo".to_owned()), (4, "curl a b".to_owned())]);
    }

    #[test]
    fn commands_that_exist_pass() {
        for line in [
            "cargo xtask demo --keep",
            "cargo xtask test --only format",
            "cargo run -p pswitch-model --example inspect",
            "target/release/pswitch serve models --http 0.0.0.0:80",
            "pswitch --version",
            "pswitch bench --out results",
            "pswitch bench switch --device cuda:0",
        ] {
            assert!(matches!(verdict(line), Verdict::Right), "{line}");
        }
        assert!(matches!(verdict("curl http://127.0.0.1"), Verdict::NotOurs));
    }

    #[test]
    fn commands_that_do_not_exist_are_found() {
        for line in [
            "cargo xtask fly",
            "cargo xtask demo --kepp",
            "cargo run -p pswitch-modell",
            "cargo run -p pswitch-model --example missing",
            "pswitch swerve",
            "pswitch serve --htt 1",
            "pswitch bench swish",
            "pswitch bench switch --devise cuda:0",
        ] {
            assert!(matches!(verdict(line), Verdict::Wrong(_)), "{line}");
        }
    }
}
