//! From views to text. Pure: the time, the width and whether there are colours are given in a [`Look`].

pub mod events;
pub mod explain;
pub mod status;
pub mod vm;
pub mod vms;
pub mod words;

#[cfg(test)]
pub mod sample;

use std::io::IsTerminal;
use std::time::SystemTime;

use anstyle::{AnsiColor, Style};
use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use jiff::tz::TimeZone;
use umbra_api::UnixMs;
use umbra_api::lifecycle::Stage;
use umbra_api::view::{Mode, ShadowRequest};

/// Width where standard output is no terminal, so that what is piped or pasted has one form. A narrower terminal breaks
/// the lines itself, which reads better than words broken in columns of three letters.
const WIDTH: u16 = 80;
/// A wider terminal is not filled: long lines read badly.
const MAX_WIDTH: u16 = 160;

/// How things are drawn.
pub struct Look {
    pub width: u16,
    pub colour: bool,
    pub now: UnixMs,
    pub tz: TimeZone,
}

impl Look {
    pub fn of_this_terminal() -> Self {
        let terminal = std::io::stdout().is_terminal();
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        Self {
            width: Table::new()
                .width()
                .filter(|_| terminal)
                .unwrap_or(WIDTH)
                .clamp(WIDTH, MAX_WIDTH),
            colour: terminal && wanted && !dumb,
            now: UnixMs::from_system(SystemTime::now()),
            tz: TimeZone::system(),
        }
    }

    pub fn clock(&self, t: UnixMs) -> String {
        words::clock(t, self.now, &self.tz)
    }

    /// A headline.
    fn bold(&self, text: &str) -> String {
        self.paint(Style::new().bold(), text)
    }

    fn warn(&self, text: &str) -> String {
        self.paint(AnsiColor::Red.on_default(), text)
    }

    fn paint(&self, style: Style, text: &str) -> String {
        if self.colour {
            format!("{style}{text}{style:#}")
        } else {
            text.to_owned()
        }
    }

    /// A table without lines, two blanks between columns, that wraps its cells to the width.
    fn bare(&self) -> Table {
        let mut t = Table::new();
        t.load_style(presets::NOTHING);
        t.set_content_arrangement(ContentArrangement::Dynamic);
        t.set_width(self.width);
        match self.colour {
            true => t.enforce_styling(),
            false => t.force_no_tty(),
        };
        t
    }

    /// With a header; the columns at `right` are numbers and stand to the right.
    fn table(&self, header: &[&str], right: &[usize], rows: Vec<Vec<Cell>>) -> String {
        let mut t = self.bare();
        t.set_header(header.iter().map(|h| Cell::new(*h)));
        t.add_rows(rows);
        for &i in right {
            if let Some(c) = t.column_mut(i) {
                c.set_cell_alignment(CellAlignment::Right);
            }
        }
        finish(t)
    }

    /// Names to the left, values to the right of them; indented, to stand under a headline.
    pub fn pairs(&self, rows: Vec<(&str, String)>) -> String {
        let mut t = self.bare();
        t.add_rows(
            rows.into_iter()
                .map(|(k, v)| vec![Cell::new(k), Cell::new(words::clean(&v))]),
        );
        indent(&finish(t))
    }

    /// Wrapped sentences, indented likewise.
    fn sentences(&self, lines: Vec<String>) -> String {
        let mut t = self.bare();
        t.add_rows(
            lines
                .into_iter()
                .map(|l| vec![Cell::new(words::glue(&words::clean(&l)))]),
        );
        words::unglue(&indent(&finish(t)))
    }
}

/// Each column is followed by two blanks. Those of the last one are cut off, which makes room for [`indent`].
fn finish(mut t: Table) -> String {
    for c in t.column_iter_mut() {
        c.set_padding((0, 2));
    }
    t.trim_fmt()
}

fn indent(text: &str) -> String {
    text.lines().map(|l| format!("  {l}")).collect::<Vec<_>>().join("\n")
}

/// Somebody else's words in a cell.
fn cell(s: &str) -> Cell {
    Cell::new(words::clean(s))
}

fn stage_cell(stage: Stage) -> Cell {
    let cell = Cell::new(words_of(stage));
    match stage {
        Stage::Unprotected => cell,
        Stage::Provisioning | Stage::Seeding | Stage::Armed => cell.fg(Color::Yellow),
        Stage::Standby | Stage::Active | Stage::Reverse => cell.fg(Color::Green),
        Stage::Switching | Stage::FailingBack => cell.fg(Color::Cyan),
        Stage::Failed => cell.fg(Color::Red),
    }
}

/// A stage as it is read; the JSON has the name with an underscore.
pub fn words_of(stage: Stage) -> String {
    stage.name().replace('_', " ")
}

pub fn mode(mode: Mode) -> String {
    match mode {
        Mode::Act => "act: Umbra decides and does".to_owned(),
        Mode::Observe => "observe: Umbra decides and records, and does nothing".to_owned(),
    }
}

/// What was asked for has been accepted, which is not yet done.
pub fn accepted(vm: &str, request: &ShadowRequest) -> String {
    let vm = words::clean(vm);
    let what = match request {
        ShadowRequest::Create { host: Some(h) } => format!("a shadow of {vm} will be made on {h}"),
        ShadowRequest::Create { host: None } => {
            format!("a shadow of {vm} will be made on a host that the planner chooses")
        }
        ShadowRequest::Switchover => format!("{vm} will switch over to its shadow"),
        ShadowRequest::Failback => format!("{vm} will move back to where it came from"),
        ShadowRequest::Release => format!("the shadow of {vm} will be ended, {vm} runs on"),
    };
    format!("Accepted: {what}.\nFollow it with\n  umbra vm show {vm}\n  umbra events --vm {vm}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acceptance_says_what_will_be_and_where_to_look() {
        let text = accepted(
            "web",
            &ShadowRequest::Create {
                host: Some("b".parse().unwrap()),
            },
        );
        assert_eq!(
            text,
            "Accepted: a shadow of web will be made on b.\n\
             Follow it with\n  umbra vm show web\n  umbra events --vm web"
        );
        assert!(accepted("web", &ShadowRequest::Release).contains("web runs on"));
    }

    #[test]
    fn no_colours_unless_asked_for() {
        let mut look = sample::look();
        assert_eq!(look.bold("x"), "x");
        assert!(
            !look
                .table(&["A"], &[], vec![vec![stage_cell(Stage::Failed)]])
                .contains('\x1b')
        );
        look.colour = true;
        assert!(look.bold("x").contains('\x1b'));
        assert!(
            look.table(&["A"], &[], vec![vec![stage_cell(Stage::Failed)]])
                .contains('\x1b')
        );
    }
}
