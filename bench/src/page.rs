//! Results of many commands as one page of HTML that needs nothing else: plots are inside, and all numbers.

use std::fmt::Write as _;

use anyhow::Context as _;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::figures::{Drawing, Figure, total_overheads};
use crate::report::{Goal, Table};

const STYLE: &str = "
body { font: 16px/1.45 'DejaVu Sans', Verdana, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.2em; border-top: 1px solid #ccc; padding-top: .8em }
svg { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; display: block; overflow-x: auto }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto; font-size: 12px }
.missed { color: #96201c; font-weight: bold } .faint { color: #666; font-size: 14px }
@media print { details { display: none } svg { page-break-inside: avoid } }
";

/// What a command has saved.
#[derive(Debug, Deserialize)]
pub(crate) struct Saved {
    pub(crate) command: String,
    arguments: Vec<String>,
    machine: Map<String, Value>,
    asked: Vec<Goal>,
    /// Results that were saved without are told by their numbers alone.
    #[serde(default)]
    tables: Vec<Table>,
    results: Value,
    /// As it was read.
    #[serde(skip)]
    text: String,
}

impl Saved {
    pub(crate) fn parse(text: String) -> anyhow::Result<Self> {
        let saved: Self = serde_json::from_str(&text).context("it is not what a command saves")?;
        Ok(Self { text, ..saved })
    }

    /// The number of the figure that it holds, if it does.
    pub(crate) fn figure(&self) -> Option<u8> {
        Figure::of(&self.results).map(|figure| figure.number)
    }

    /// When it was measured.
    pub(crate) fn date(&self) -> &str {
        self.fact("date")
    }

    /// How many goals were met, and of how many.
    pub(crate) fn goals(&self) -> (usize, usize) {
        (self.asked.iter().filter(|goal| goal.is_met()).count(), self.asked.len())
    }

    fn fact(&self, name: &str) -> &str {
        self.machine.get(name).and_then(Value::as_str).unwrap_or("unknown")
    }

    /// Where it was measured, in a line.
    fn place(&self) -> String {
        let gpu = self.machine.get("gpu").and_then(|gpu| gpu.get("name")).and_then(Value::as_str);
        let gpu = gpu.map(|name| format!("{name}, ")).unwrap_or_default();
        let [cpu, torch, commit, build] = ["cpu", "torch", "commit", "build"].map(|name| self.fact(name));
        format!("{gpu}{cpu}; libtorch {torch}, commit {commit}, {build} build; {}", self.date())
    }
}

/// The page of results, in their order, and of files that could not be read.
pub(crate) fn html(saved: &[Saved], unread: &[(String, String)]) -> anyhow::Result<String> {
    let mut page = String::from("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    write!(page, "<title>pswitch: what was measured</title>\n<style>{STYLE}</style>\n</head>\n<body>\n")?;
    page.push_str("<h1>pswitch: what was measured</h1>\n");
    contents(&mut page, saved)?;
    for (file, reason) in unread {
        writeln!(page, "<p class=\"missed\">{} was not read: {}</p>", escaped(file), escaped(reason))?;
    }
    for one in saved {
        section(&mut page, one).with_context(|| format!("cannot show {}", one.command))?;
    }
    page.push_str("</body>\n</html>\n");
    Ok(page)
}

fn contents(page: &mut String, saved: &[Saved]) -> anyhow::Result<()> {
    page.push_str("<table><tr><th>command</th><th>measured</th><th>commit</th><th>goals met</th></tr>\n");
    for one in saved {
        let (met, of) = one.goals();
        let command = escaped(&one.command);
        writeln!(
            page,
            "<tr><td><a href=\"#{command}\">{command}</a></td><td>{}</td><td>{}</td><td>{met} of {of}</td></tr>",
            escaped(one.date()),
            escaped(one.fact("commit"))
        )?;
    }
    page.push_str("</table>\n");
    Ok(())
}

fn section(page: &mut String, saved: &Saved) -> anyhow::Result<()> {
    let command = escaped(&saved.command);
    writeln!(page, "<h2 id=\"{command}\">{command}</h2>")?;
    let place = saved.place();
    writeln!(page, "<p class=\"faint\">{}</p>", escaped(&place))?;
    writeln!(page, "<p class=\"faint\"><code>pswitch {}</code></p>", escaped(&saved.arguments.join(" ")))?;
    let figure = Figure::of(&saved.results);
    if let Some(figure) = &figure {
        page.push_str(&Drawing::of(figure, &place).svg()?);
        page.push('\n');
    }
    for table in &saved.tables {
        rows(page, table)?;
    }
    if let Some(published) = figure.as_ref().and_then(total_overheads) {
        page.push_str(
            "<p>Total overhead, milliseconds beyond the ready model, as published in the paper:</p>\n",
        );
        rows(page, &published)?;
    }
    if !saved.asked.is_empty() {
        page.push_str("<ul>\n");
        for goal in &saved.asked {
            let class = if goal.is_met() { "" } else { " class=\"missed\"" };
            writeln!(page, "<li{class}>{}</li>", escaped(&goal.to_string()))?;
        }
        page.push_str("</ul>\n");
    }
    let machine = serde_json::to_string_pretty(&saved.machine)?;
    details(page, "machine", &machine)?;
    details(page, "all data", &saved.text)
}

/// The first row is the header.
fn rows(page: &mut String, table: &Table) -> anyhow::Result<()> {
    page.push_str("<table>\n");
    for (index, row) in table.rows().iter().enumerate() {
        let cell = if index == 0 { "th" } else { "td" };
        page.push_str("<tr>");
        for text in row {
            write!(page, "<{cell}>{}</{cell}>", escaped(text))?;
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n");
    Ok(())
}

fn details(page: &mut String, what: &str, text: &str) -> anyhow::Result<()> {
    writeln!(page, "<details><summary>{what}</summary><pre>{}</pre></details>", escaped(text))?;
    Ok(())
}

/// Text that is no markup.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::made_up;
    use crate::machine::Machine;
    use crate::report::Report;

    fn saved(command: &'static str, results: Value) -> Saved {
        let mut table = Table::new(["model", "ms"]);
        table.push(["a<b".to_owned(), "8.6".to_owned()]);
        let goals = vec![Goal::at_most("wrong outputs", 0.0, "", 1.0), Goal::at_least("met", 1.0, "", 2.0)];
        let report = Report { command, tables: vec![table], goals, results };
        let json = report.json(&Machine::here(), &["bench".to_owned(), command.to_owned()]);
        Saved::parse(json.to_string()).unwrap()
    }

    #[test]
    fn a_page_holds_plots_tables_goals_and_data_and_asks_for_nothing_else() {
        let mut all: Vec<_> = made_up::all()
            .iter()
            .map(|figure| saved("figure5", serde_json::to_value(figure).unwrap()))
            .collect();
        all.push(saved("switch", serde_json::json!({"text": "</pre><script>"})));
        assert_eq!(all.last().unwrap().figure(), None);
        assert_eq!(all[0].goals(), (1, 2));
        let page = html(&all, &[("x.json".to_owned(), "not JSON".to_owned())]).unwrap();
        assert_eq!(page.matches("<svg").count(), made_up::all().len());
        for text in [
            "<td>a&lt;b</td><td>8.6</td>",
            "<li class=\"missed\">wrong outputs: 1 (asked: at most 0): MISSED</li>",
            "<li>met: 2 (asked: at least 1): met</li>",
            "x.json was not read: not JSON",
            "&lt;/pre&gt;&lt;script&gt;",
            "6475.4",
            "published, V100",
        ] {
            assert!(page.contains(text), "{text}");
        }
        for foreign in ["<script", "src=", "@import", "url(", "<link"] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        // The name of SVG's own language is no address that is asked for.
        assert_eq!(page.matches("http").count(), page.matches("http://www.w3.org/2000/svg").count());
    }

    #[test]
    fn results_of_before_there_were_tables_are_read_and_others_are_not() {
        let text = r#"{"command": "kill", "arguments": [], "machine": {}, "asked": [], "results": {}}"#;
        assert_eq!(Saved::parse(text.to_owned()).unwrap().date(), "unknown");
        assert!(Saved::parse("{}".to_owned()).is_err());
    }
}
