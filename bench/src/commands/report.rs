//! All results of a folder as one page.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::page::{self, Saved};
use crate::report::{Report, Table};

/// The page, in the folder of the results unless told otherwise.
pub(crate) const PAGE: &str = "report.html";

/// Gathers the results of a folder into one page of HTML.
///
/// The page needs no network and no other file: plots are inside, and so are all numbers, what was asked for, what was left
/// out and why, and where and of what everything was measured.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench report
  pswitch bench report results --html page.html")]
pub(crate) struct GatherReport {
    /// A folder that --out of other commands has named.
    #[arg(value_name = "FOLDER", default_value = "bench/results")]
    folder: PathBuf,
    /// Where to write the page; FOLDER/report.html by default.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl GatherReport {
    pub(crate) fn run(&self) -> anyhow::Result<Report> {
        let html = self.html.clone().unwrap_or_else(|| self.folder.join(PAGE));
        gather(&self.folder, &html)
    }
}

/// Writes the page of a folder. Figures come first, in the order of their numbers, then other commands by their names.
pub(crate) fn gather(folder: &Path, html: &Path) -> anyhow::Result<Report> {
    let (mut saved, mut unread) = (Vec::new(), Vec::new());
    for path in files(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        match Saved::parse(text) {
            // What this command itself has saved.
            Ok(found) if found.command == COMMAND => {}
            Ok(found) => saved.push(found),
            Err(error) => unread.push((name, format!("{error:#}"))),
        }
    }
    ensure!(!saved.is_empty(), "{} holds no results: commands write them with --out", folder.display());
    saved.sort_by_key(|one| (one.figure().unwrap_or(u8::MAX), one.command.clone()));
    let text = page::html(&saved, &unread)?;
    fs::write(html, text).with_context(|| format!("cannot write {}", html.display()))?;

    let mut table = Table::new(["gathered", "measured", "goals met"]);
    for one in &saved {
        let (met, of) = one.goals();
        table.push([one.command.clone(), one.date().to_owned(), format!("{met} of {of}")]);
    }
    for (file, reason) in &unread {
        table.push([format!("{file}: {reason}"), "-".to_owned(), "-".to_owned()]);
    }
    eprintln!("written to {}", html.display());
    let commands: Vec<&str> = saved.iter().map(|one| one.command.as_str()).collect();
    let results = json!({"page": html, "commands": commands});
    Ok(Report { command: COMMAND, tables: vec![table], goals: Vec::new(), results })
}

const COMMAND: &str = "report";

/// All JSON files of a folder, not of those below.
fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read {}", folder.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::made_up;
    use crate::machine::Machine;

    #[test]
    fn a_folder_becomes_a_page_with_figures_first() {
        let folder = tempfile::tempdir().unwrap();
        let page = folder.path().join("page.html");
        assert!(gather(folder.path(), &page).unwrap_err().to_string().contains("holds no results"));
        for (command, results) in [
            ("figure10", serde_json::to_value(made_up::loads()).unwrap()),
            ("figure9", serde_json::to_value(made_up::bars(9, &[("pswitch", 5.0)])).unwrap()),
            ("front-end", json!({})),
            ("report", json!({})),
        ] {
            let report = Report { command, tables: Vec::new(), goals: Vec::new(), results };
            report.save(folder.path(), &Machine::here(), &[]).unwrap();
        }
        fs::write(folder.path().join("odd.json"), "[]").unwrap();
        fs::write(folder.path().join("notes.txt"), "nothing").unwrap();
        let report = gather(folder.path(), &page).unwrap();
        assert_eq!(report.results["commands"], json!(["figure9", "figure10", "front-end"]));
        let text = fs::read_to_string(page).unwrap();
        assert_eq!(text.matches("<svg").count(), 2);
        assert!(text.contains("odd.json was not read"));
    }
}
