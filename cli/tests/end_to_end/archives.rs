//! Archives that are broken or hostile, next to a good one: each is left out with its reason, nothing else happens.

use std::io::{Cursor, Read as _, Write as _};
use std::os::unix::fs::symlink;

use serde_json::{Value, json};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::support::{Dice, Fixture, Models, Serve, Server, assert_says, pswitch, run};

const PROGRAM: &str = "models/model.json";
const WEIGHTS: &str = "data/weights/model_weights_config.json";
const WEIGHT: &str = "data/weights/weight_0";

/// An archive in pieces, to be changed and put together again.
#[derive(Clone)]
struct Pieces {
    root: String,
    /// Names without the top folder.
    entries: Vec<(String, Vec<u8>)>,
}

impl Pieces {
    fn of(fixture: &Fixture) -> Self {
        let mut zip = ZipArchive::new(std::fs::File::open(&fixture.archive).unwrap()).unwrap();
        let mut pieces = Self { root: String::new(), entries: Vec::new() };
        for index in 0..zip.len() {
            let mut entry = zip.by_index(index).unwrap();
            let mut contents = Vec::new();
            entry.read_to_end(&mut contents).unwrap();
            let (root, name) = entry.name().split_once('/').unwrap();
            root.clone_into(&mut pieces.root);
            pieces.entries.push((name.to_owned(), contents));
        }
        pieces
    }

    fn entry(&mut self, name: &str) -> &mut Vec<u8> {
        let found = self.entries.iter_mut().find(|(entry, _)| entry == name);
        &mut found.unwrap_or_else(|| panic!("no entry {name}")).1
    }

    fn with(mut self, entry: &str, contents: impl Into<Vec<u8>>) -> Self {
        *self.entry(entry) = contents.into();
        self
    }

    fn without(mut self, entry: &str) -> Self {
        self.entry(entry);
        self.entries.retain(|(name, _)| name != entry);
        self
    }

    fn edit(mut self, entry: &str, edit: impl FnOnce(&mut Value)) -> Self {
        let contents = self.entry(entry);
        let mut json = serde_json::from_slice(contents).unwrap();
        edit(&mut json);
        *contents = serde_json::to_vec(&json).unwrap();
        self
    }

    /// Changes the description of one of the weights.
    fn edit_weight(self, edit: impl FnOnce(&mut Value)) -> Self {
        self.edit(WEIGHTS, |weights| {
            edit(weights["config"].as_object_mut().unwrap().values_mut().next().unwrap());
        })
    }

    /// Changes the first node of the graph that calls this operator.
    fn edit_node(self, operator: &str, edit: impl FnOnce(&mut Value)) -> Self {
        self.edit(PROGRAM, |program| {
            let mut nodes = program["graph_module"]["graph"]["nodes"].as_array_mut().unwrap().iter_mut();
            edit(nodes.find(|node| node["target"] == operator).unwrap());
        })
    }

    fn bytes(&self) -> Vec<u8> {
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, contents) in &self.entries {
            writer.start_file(format!("{}/{name}", self.root), options).unwrap();
            writer.write_all(contents).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }
}

/// Gives every entry of the archive's directory a length of almost 4 GiB.
fn claim_gigabytes(mut archive: Vec<u8>) -> Vec<u8> {
    let starts: Vec<usize> =
        (0..archive.len() - 4).filter(|&at| &archive[at..at + 4] == b"PK\x01\x02").collect();
    for at in starts {
        archive[at + 20..at + 28].copy_from_slice(&[0xF0, 0xFF, 0xFF, 0xFF, 0xF0, 0xFF, 0xFF, 0xFF]);
    }
    archive
}

#[test]
fn what_cannot_be_served_is_left_out_with_its_reason() {
    let good = Fixture::load("two-in-three-out");
    let other = Fixture::load("recurrent");
    let pieces = || Pieces::of(&good);
    let whole = std::fs::read(&good.archive).unwrap();
    let half_weight = {
        let mut all = pieces();
        let half = all.entry(WEIGHT).len() / 2;
        all.entry(WEIGHT).truncate(half);
        all
    };
    let mut noise = Dice::new(5);
    let noise: Vec<u8> = (0..65536).map(|_| u8::try_from(noise.below(256)).unwrap()).collect();
    let linear = "torch.ops.aten.linear.default";

    let archives: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("cut-short", whole[..whole.len() - 1].to_vec(), &["model.pt2", "zip"]),
        ("cut-to-half", whole[..whole.len() / 2].to_vec(), &["model.pt2", "zip"]),
        ("empty", Vec::new(), &["model.pt2", "zip"]),
        ("noise", noise, &["model.pt2", "zip"]),
        ("claims-gigabytes", claim_gigabytes(whole.clone()), &["model.pt2", "4294967280"]),
        ("weights-cut", half_weight.bytes(), &["model.pt2", WEIGHT]),
        ("weights-missing", pieces().without(WEIGHT).bytes(), &["model.pt2", WEIGHT]),
        ("program-missing", pieces().without(PROGRAM).bytes(), &["model.pt2", "no program", "models/*.json"]),
        ("deep", pieces().with(PROGRAM, "[".repeat(200_000)).bytes(), &[PROGRAM, "line 1 column"]),
        ("not-json", pieces().with(PROGRAM, "{\"graph_module\": }").bytes(), &[PROGRAM, "line 1 column 18"]),
        (
            "overflow",
            pieces()
                .edit_weight(|w| {
                    w["tensor_meta"]["sizes"] = json!([{"as_int": 1_u64 << 62}, {"as_int": 1_u64 << 62}])
                })
                .bytes(),
            &["model.pt2", "4611686018427387904"],
        ),
        (
            "outside",
            pieces()
                .edit_weight(|w| w["tensor_meta"]["storage_offset"] = json!({"as_int": 1_u64 << 40}))
                .bytes(),
            &["model.pt2", "1099511627776"],
        ),
        (
            "another-schema",
            pieces().edit(PROGRAM, |program| program["schema_version"]["major"] = json!(99)).bytes(),
            &["schema", "99"],
        ),
        (
            "unknown-operator",
            pieces()
                .edit_node(linear, |node| node["target"] = json!("torch.ops.aten.lineal.default"))
                .bytes(),
            &["aten::lineal", "node 'linear"],
        ),
        (
            "custom-operator",
            pieces()
                .edit_node(linear, |node| node["target"] = json!("torch.ops.mine.special.default"))
                .bytes(),
            &["mine::special", "node 'linear"],
        ),
        (
            "unknown-argument",
            pieces().edit_node(linear, |node| node["inputs"][1]["name"] = json!("wait")).bytes(),
            &["aten::linear", "no argument 'wait'"],
        ),
    ];
    let models = Models::of([&good, &other]);
    for (name, bytes, _) in &archives {
        models.write(name, bytes);
    }
    let mut expected: Vec<(&str, &[&str])> = archives.iter().map(|(name, _, says)| (*name, *says)).collect();

    // Folders that are no models, and models with settings that are none.
    std::fs::create_dir(models.archive("a-folder")).unwrap();
    std::fs::create_dir(models.path().join("nothing")).unwrap();
    let in_circles = models.archive("in-circles");
    symlink(&in_circles, &in_circles).unwrap();
    nix::unistd::mkfifo(&models.archive("a-pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for name in ["odd name", "typo", "no-number", "not-yaml"] {
        models.link(name, &good.archive);
    }
    models.settings("typo", "version: 2\nmax_que: 8\n");
    models.settings("no-number", "deadline_ms: soon\n");
    models.settings("not-yaml", "version: \"2\n");
    expected.extend::<[(&str, &[&str]); 8]>([
        ("a-folder", &["there is no", "model.pt2"]),
        ("nothing", &["there is no", "model.pt2", "pswitch-export"]),
        ("in-circles", &["cannot read", "model.pt2"]),
        ("a-pipe", &["there is no", "model.pt2"]),
        ("odd name", &["'odd name' is not a model's name", "letters, digits"]),
        ("typo", &["model.yaml", "unknown field `max_que`", "`max_queue`", "line 2 column 1"]),
        ("no-number", &["model.yaml", "deadline_ms", "\"soon\"", "line 1 column 14"]),
        ("not-yaml", &["model.yaml", "end of stream at line 2 column 1"]),
    ]);

    // Without a server first: what can be seen in the files is told from the files.
    let listed = run(pswitch().args(["models", "--format", "json"]).arg(models.path()));
    assert_eq!(listed.code, Some(0), "{}", listed.stderr);
    let rows: Value = serde_json::from_str(&listed.stdout).unwrap();
    for (name, says) in &expected {
        let row = rows.as_array().unwrap().iter().find(|row| row["name"] == *name).unwrap();
        // What libtorch has not is for a server to find out.
        if !matches!(*name, "unknown-operator" | "custom-operator" | "unknown-argument") {
            assert_eq!(row["state"], "BROKEN", "{name}");
            assert_says(row["reason"].as_str().unwrap(), says);
        }
    }

    let server = Serve::new(models).host(1).start();
    let index = server.client.index();
    assert_eq!(index.len(), expected.len() + 2);
    for (name, says) in &expected {
        let (state, reason) = &index[*name];
        assert_eq!(state, "UNAVAILABLE", "{name}");
        assert_says(reason, says);
        assert!(!reason.contains('\n') && reason.len() < 1000, "{name}: a reason is a line: {reason}");
        if *name != "odd name" {
            let refusal = server.client.infer(name, &good.cases[0].inputs).unwrap_err();
            assert_eq!(refusal.status, 503, "{name}");
            assert_says(&refusal.error, says);
        }
    }
    assert_eq!(server.client.get("/v2/health/ready").unwrap().status, 200);
    assert_good(&server, [&good, &other]);
    assert_eq!(server.client.metric("pswitch_worker_restarts_total"), 0.0);
}

fn assert_good<'a>(server: &Server, fixtures: impl IntoIterator<Item = &'a Fixture>) {
    for fixture in fixtures {
        for case in &fixture.cases {
            server.client.check(&fixture.name, case);
        }
    }
}

/// Sixty programs with something changed at random: whatever they do, the good one next to them is served.
#[test]
fn programs_that_were_tampered_with_harm_nobody() {
    let good = Fixture::load("two-in-three-out");
    let models = Models::of([&good]);
    let mut dice = Dice::new(11);
    for number in 0..60 {
        let mut pieces = Pieces::of(&good);
        let program = pieces.entry(PROGRAM);
        for _ in 0..=dice.below(3) {
            // One character for another of its kind, so that most of the results are still JSON.
            let at = loop {
                let at = dice.below(program.len());
                if program[at].is_ascii_alphanumeric() {
                    break at;
                }
            };
            program[at] = match program[at] {
                b'0'..=b'9' => b"0123456789"[dice.below(10)],
                _ => b"abcdefghijklmnopqrstuvwxyz_"[dice.below(27)],
            };
        }
        models.write(&format!("tampered-{number}"), &pieces.bytes());
    }
    let server = Serve::new(models).host(1).start();
    let index = server.client.index();
    assert_eq!(index.len(), 61);
    let mut refused = 0;
    for (name, (state, reason)) in &index {
        match state.as_str() {
            "READY" => drop(server.client.infer(name, &good.cases[0].inputs)),
            "UNAVAILABLE" => {
                assert!(!reason.is_empty(), "{name} is refused without a reason");
                refused += 1;
            }
            other => panic!("{name} is {other}"),
        }
        server.client.check(&good.name, &good.cases[0]);
    }
    assert!(
        (5..60).contains(&refused),
        "{refused} of 60 were refused: the changes were too small or too large"
    );
    server.await_workers(2);
    assert_good(&server, [&good]);
}
