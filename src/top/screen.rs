//! Job: draw what `etcd-ferry top` knows: a table of links, and under it what is to be said of them.
//! Input: a `Past`, the time. Output: a frame of a terminal, or text.
//! Pure: no clock, no I/O; ratatui only fills cells of a buffer here.
//! Always true: on a narrow terminal columns are left out, the least urgent first; link and state stay.

use super::past::{HEADER, POINTS, Past, Row, Tone};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row as TableRow, Table, Wrap};

/// Columns of [`HEADER`], the first to be left out last.
const LEFT_OUT: [usize; 9] = [8, 6, 9, 5, 7, 0, 10, 2, 4];
/// Between two columns.
const GAP: usize = 2;
/// Of the table at most, in parts of a hundred, so that notes have room.
const TABLE_SHARE: u16 = 70;

pub fn draw(frame: &mut Frame<'_>, past: &Past, now_ms: u64) {
    let (rows, notes) = (past.rows(now_ms), past.notes());
    let area = frame.area();
    let table_height = u16::try_from(rows.len() + 1).unwrap_or(u16::MAX);
    let most = if notes.is_empty() { area.height } else { area.height.saturating_mul(TABLE_SHARE) / 100 };
    let heights = [Constraint::Length(2), Constraint::Length(table_height.min(most)), Constraint::Min(0)];
    let [head, middle, foot] = Layout::vertical(heights).areas(area);
    let (answering, all) = past.counts();
    let title = format!("etcd-ferry top: {answering} of {all} sidecars answer, {} links", rows.len());
    let keys = Line::styled("q or Ctrl-C quits", Style::new().add_modifier(Modifier::DIM)).right_aligned();
    frame.render_widget(keys, head);
    frame.render_widget(Line::styled(title, Style::new().add_modifier(Modifier::BOLD)), head);
    frame.render_widget(table(&rows, usize::from(area.width)), middle);
    let notes: Vec<Line<'_>> = notes.into_iter().map(Line::from).collect();
    frame.render_widget(Paragraph::new(notes).wrap(Wrap { trim: false }), foot);
}

/// For what is no terminal.
pub fn text(past: &Past, now_ms: u64) -> String {
    // One look has no curve.
    let columns: Vec<usize> = (0..HEADER.len()).filter(|column| *column != 5).collect();
    let rows = past.rows(now_ms);
    let widths = widths(&rows);
    let cells = |cell: &dyn Fn(usize) -> String| {
        let padded = columns.iter().map(|column| format!("{:<1$}", cell(*column), widths[*column]));
        format!("{}\n", padded.collect::<Vec<_>>().join("  ").trim_end())
    };
    let mut text = cells(&|column| HEADER[column].to_owned());
    for row in &rows {
        text.push_str(&cells(&|column| row.cells[column].clone()));
    }
    past.notes().iter().for_each(|note| text.push_str(&format!("{note}\n")));
    text
}

fn table<'a>(rows: &'a [Row], room: usize) -> Table<'a> {
    let widths = widths(rows);
    let columns = columns(&widths, room);
    let header = columns.iter().map(|column| Cell::from(HEADER[*column]));
    let lines = rows.iter().map(|row| {
        let cell = |column: &usize| {
            let cell = Cell::from(row.cells[*column].as_str());
            if *column == 3 { cell.style(Style::new().fg(colour(row.tone))) } else { cell }
        };
        TableRow::new(columns.iter().map(cell).collect::<Vec<_>>())
    });
    let length = |column: &usize| Constraint::Length(u16::try_from(widths[*column]).unwrap_or(u16::MAX));
    Table::new(lines.collect::<Vec<_>>(), columns.iter().map(length).collect::<Vec<_>>())
        .header(TableRow::new(header.collect::<Vec<_>>()).style(Style::new().add_modifier(Modifier::DIM)))
        .column_spacing(u16::try_from(GAP).unwrap_or(1))
}

fn colour(tone: Tone) -> Color {
    match tone {
        Tone::Good => Color::Green,
        Tone::Busy => Color::Yellow,
        Tone::Bad => Color::Red,
    }
}

/// Each column as wide as its widest cell.
fn widths(rows: &[Row]) -> [usize; 11] {
    let mut widths = HEADER.map(|title| title.chars().count());
    widths[5] = POINTS;
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(&row.cells) {
            *width = (*width).max(cell.chars().count());
        }
    }
    widths
}

/// The columns that have room, in their order.
fn columns(widths: &[usize; 11], room: usize) -> Vec<usize> {
    let mut columns: Vec<usize> = (0..HEADER.len()).collect();
    let needed =
        |columns: &[usize]| columns.iter().map(|column| widths[*column] + GAP).sum::<usize>().saturating_sub(GAP);
    for left_out in LEFT_OUT {
        if needed(&columns) <= room {
            break;
        }
        columns.retain(|column| *column != left_out);
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::super::past::tests::{link, looked_at, reply};
    use super::*;
    use crate::admin::proto::Link;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    /// What a terminal of this size shows, line by line, without what is right of it.
    fn drawn(past: &Past, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, past, 1_010_000)).unwrap();
        let buffer = terminal.backend().buffer();
        let cell = |x, y| buffer[(x, y)].symbol().to_owned();
        let line = |y| (0..width).map(|x| cell(x, y)).collect::<String>().trim_end().to_owned();
        (0..height).map(line).collect()
    }

    fn two_sidecars() -> Past {
        let mut past = Past::new(vec!["east.toml".to_owned(), "hangzhou.toml".to_owned()]);
        looked_at(&mut past, 9);
        let stopped = Link { reason: "the origin was restored".to_owned(), ..link("orders", "replica", "stopped") };
        past.answered(1, reply("cn-hangzhou-a", vec![link("config", "replica", "following"), stopped]), 1_010_000);
        past
    }

    #[test]
    fn every_link_has_a_line_with_state_lag_its_curve_rates_spool_and_the_last_proof() {
        let lines = drawn(&two_sidecars(), 190, 9);
        assert!(lines[0].starts_with("etcd-ferry top: 2 of 2 sidecars answer, 3 links"), "{lines:#?}");
        assert!(lines[0].ends_with("q or Ctrl-C quits"), "{lines:#?}");
        let words = |line: &str| line.split("  ").map(str::trim).filter(|w| !w.is_empty()).map(str::to_owned).collect();
        let first: Vec<String> = words(&lines[3]);
        let wanted = [
            "us-east-1-a",
            "config",
            "origin",
            "following",
            "800 ms, 8 rev",
            "▁▁▂▃▄▅▆▇█",
            "0 ms",
            "100",
            "2.0 KiB",
            "3.0 MiB, 0 %",
            "1 min 10 s ago, at 4711",
        ];
        assert_eq!(first, wanted, "{lines:#?}");
        assert!(lines[2].starts_with("SIDECAR") && lines[2].ends_with("PROVED EQUAL"), "{lines:#?}");
        assert!(lines[5].contains("orders  replica  stopped"), "{lines:#?}");
        assert_eq!(lines[6], "cn-hangzhou-a, orders (replica): the origin was restored");
    }

    #[test]
    fn a_narrow_terminal_leaves_out_the_least_urgent_columns() {
        let lines = drawn(&two_sidecars(), 80, 9);
        for (title, shown) in [("LINK", true), ("STATE", true), ("LAG", true), ("PROVED", true), ("SENT/S", false)] {
            assert_eq!(lines[2].contains(title), shown, "{title} in {lines:#?}");
        }
        let lines = drawn(&two_sidecars(), 20, 9);
        assert_eq!(lines[2].split_whitespace().collect::<Vec<_>>(), ["LINK", "STATE"], "{lines:#?}");
        drawn(&two_sidecars(), 1, 1);
    }

    #[test]
    fn a_state_has_a_colour() {
        let mut terminal = Terminal::new(TestBackend::new(190, 9)).unwrap();
        terminal.draw(|frame| draw(frame, &two_sidecars(), 1_010_000)).unwrap();
        let buffer = terminal.backend().buffer();
        let colour_of = |y: u16, word: &str| {
            let line: String = (0..190).map(|x| buffer[(x, y)].symbol().to_owned()).collect();
            let at = line[..line.find(word).expect("the word is there")].chars().count();
            buffer[(u16::try_from(at).unwrap(), y)].fg
        };
        assert_eq!((colour_of(3, "following"), colour_of(5, "stopped")), (Color::Green, Color::Red));
    }

    #[test]
    fn text_has_the_same_without_the_curve() {
        let text = text(&two_sidecars(), 1_010_000);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert!(lines[0].starts_with("SIDECAR        LINK    SIDE     STATE"), "{text}");
        assert!(lines[1].contains("800 ms, 8 rev") && !text.contains('█'), "{text}");
        assert!(lines[4].ends_with("the origin was restored"), "{text}");
    }
}
