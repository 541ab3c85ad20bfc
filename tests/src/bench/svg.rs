//! The chart: a panel for each metric, a bar for each contender from 0 to its median, a line from the lowest to the highest round.

use super::Family;
use super::measure::{METRICS, Metric};
use super::report::{Report, Spread, short};
use std::fmt::Write as _;

const COLUMNS: usize = 3;
const PANEL: f64 = 540.0;
const LABELS: f64 = 220.0;
const BARS: f64 = 200.0;
const ROW: f64 = 20.0;
const TOP: f64 = 120.0;
/// Of a panel, besides its rows.
const AROUND: f64 = 100.0;
const FAMILIES: [(Family, &str, &str); 4] = [
    (Family::Kernel, "the kernel", "#7f8c9a"),
    (Family::OpenVswitch, "Open vSwitch", "#c98a2b"),
    (Family::Floor, "floor: a forwarder without logic", "#b9a3d3"),
    (Family::Sluice, "Sluice", "#2477b3"),
];

/// The whole file.
pub(super) fn chart(report: &Report, base: usize) -> String {
    let panel_height = AROUND + ROW * report.rows.len() as f64;
    let lines = METRICS.len().div_ceil(COLUMNS);
    let (width, height) = (
        PANEL * COLUMNS as f64 + 20.0,
        TOP + panel_height * lines as f64,
    );
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    label(
        &mut text,
        (20.0, 34.0),
        "font-size=\"22\" font-weight=\"bold\"",
        &report.title,
    );
    let subtitle = format!(
        "{}; {}; bars: medians, ratio to {}",
        report.machine,
        report.extent(),
        report.rows[base].name
    );
    label(&mut text, (20.0, 56.0), "fill=\"#555\"", &subtitle);
    legend(&mut text, report);
    for (index, metric) in METRICS.iter().enumerate() {
        let x = 20.0 + PANEL * (index % COLUMNS) as f64;
        let y = TOP + panel_height * (index / COLUMNS) as f64;
        panel(&mut text, report, (index, metric, base), (x, y));
    }
    text += "</svg>\n";
    text
}

fn legend(text: &mut String, report: &Report) {
    let mut x = 20.0;
    for (family, name, colour) in FAMILIES {
        if report.rows.iter().all(|row| row.family != family) {
            continue;
        }
        rectangle(text, (x, 72.0, 14.0, 14.0), colour);
        label(text, (x + 20.0, 84.0), "", name);
        x += 50.0 + 7.0 * name.len() as f64;
    }
    line(text, (x, 79.0), (x + 24.0, 79.0), "#222");
    label(text, (x + 30.0, 84.0), "", "lowest to highest round");
}

fn panel(
    text: &mut String,
    report: &Report,
    (index, metric, base): (usize, &Metric, usize),
    (x, y): (f64, f64),
) {
    let better = if metric.more_is_better {
        "more"
    } else {
        "less"
    };
    let whom = if metric.service {
        "Service, if any"
    } else {
        "pod"
    };
    label(
        text,
        (x, y + 16.0),
        "font-size=\"15\" font-weight=\"bold\"",
        &format!("{}, {}", metric.name, metric.unit),
    );
    label(
        text,
        (x, y + 33.0),
        "fill=\"#555\"",
        &format!("{better} is better; sent to: {whom}"),
    );
    let spreads: Vec<Option<Spread>> = report.rows.iter().map(|row| row.spread(index)).collect();
    let highest = spreads
        .iter()
        .flatten()
        .map(|it| it.high)
        .fold(0.0, f64::max);
    let step = step(highest);
    let ticks = (highest / step).ceil().max(1.0);
    let scale = BARS / (ticks * step);
    let (left, first) = (x + LABELS, y + 46.0);
    let bottom = first + ROW * report.rows.len() as f64;
    let mut tick = 0.0;
    while tick <= ticks {
        let at = left + tick * step * scale;
        line(text, (at, first), (at, bottom + 4.0), "#ddd");
        label(
            text,
            (at, bottom + 17.0),
            "text-anchor=\"middle\" fill=\"#555\"",
            &axis(tick * step),
        );
        tick += 1.0;
    }
    let middle = (left + BARS / 2.0, bottom + 34.0);
    label(
        text,
        middle,
        "text-anchor=\"middle\" fill=\"#555\"",
        metric.unit,
    );
    for (row, spread) in spreads.iter().enumerate() {
        let at = first + ROW * row as f64;
        let contender = &report.rows[row];
        let name = (left - 8.0, at + 14.0);
        label(text, name, "text-anchor=\"end\"", contender.name);
        let Some(Spread { median, low, high }) = *spread else {
            continue;
        };
        let colour = FAMILIES.iter().find(|it| it.0 == contender.family);
        let colour = colour.map_or("#000", |it| it.2);
        rectangle(text, (left, at + 3.0, median * scale, ROW - 6.0), colour);
        let (from, to) = (left + low * scale, left + high * scale);
        line(text, (from, at + ROW / 2.0), (to, at + ROW / 2.0), "#222");
        for end in [from, to] {
            line(text, (end, at + 6.0), (end, at + ROW - 6.0), "#222");
        }
        let ratio = report.ratio(row, base, index);
        let ratio = ratio.map(|it| format!(" ({it:.2}x)")).unwrap_or_default();
        let value = format!("{}{ratio}", short(median));
        label(text, (left + BARS + 10.0, at + 14.0), "", &value);
    }
}

/// Between two ticks: 1, 2 or 5 times a power of ten, so that there are three to five of them.
fn step(highest: f64) -> f64 {
    if highest <= 0.0 {
        return 1.0;
    }
    let rough = (highest / 4.0).max(1e-3);
    let power = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|it| it * power);
    steps.into_iter().find(|it| *it >= rough).unwrap_or(rough)
}

fn axis(value: f64) -> String {
    let rounded = (value * 1e4).round() / 1e4;
    format!("{rounded}")
}

fn label(text: &mut String, (x, y): (f64, f64), style: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{words}</text>"
    );
}

fn rectangle(text: &mut String, (x, y, width, height): (f64, f64, f64, f64), colour: &str) {
    let _ = writeln!(
        text,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
    );
}

fn line(text: &mut String, (a, b): (f64, f64), (c, d): (f64, f64), colour: &str) {
    let _ = writeln!(
        text,
        "<line x1=\"{a:.1}\" y1=\"{b:.1}\" x2=\"{c:.1}\" y2=\"{d:.1}\" stroke=\"{colour}\"/>"
    );
}
