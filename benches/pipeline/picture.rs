//! Job: two charts side by side: lag over time at 200 revisions a second, and p99 of the lag against the rate; both on the far line.
//! Input: the report. Output: an SVG file.
//! Always true: what was not measured is an empty chart, not an error.

use crate::report::Report;
use crate::rig::System;
use plotters::prelude::*;
use std::path::Path;

const SIZE: (u32, u32) = (1_200, 460);
const MIRROR: RGBColor = RGBColor(200, 80, 40);
const FERRY: RGBColor = RGBColor(30, 100, 180);
const STRAIGHT: RGBColor = RGBColor(130, 130, 130);

fn colour(system: System) -> RGBColor {
    match system {
        System::MakeMirror => MIRROR,
        System::EtcdFerry => FERRY,
        System::Straight => STRAIGHT,
    }
}

pub fn draw(path: &Path, report: &Report) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);

    let over_time: Vec<(System, Vec<(f64, f64)>)> = report
        .over_time
        .iter()
        .map(|(system, lags)| (*system, lags.iter().map(|lag| (lag.at, lag.lag * 1e3)).collect()))
        .collect();
    let highest = largest(over_time.iter().flat_map(|(_, points)| points.iter().map(|p| p.1)));
    let longest = largest(over_time.iter().flat_map(|(_, points)| points.iter().map(|p| p.0)));
    let mut chart = ChartBuilder::on(&left)
        .caption("lag at 200 revisions/s, 40 ms one way", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..longest, 0.0..highest)?;
    chart.configure_mesh().max_light_lines(0).x_desc("seconds").y_desc("lag, ms").draw()?;
    for (system, points) in over_time {
        let colour = colour(system);
        chart
            .draw_series(points.into_iter().map(|point| Circle::new(point, 1, colour.filled())))?
            .label(system.name())
            .legend(move |(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
    }
    chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;

    let rates: Vec<f64> = report.trials.iter().map(|trial| trial.rate as f64).collect();
    let (lowest, fastest) = (rates.iter().copied().fold(f64::INFINITY, f64::min), largest(rates.iter().copied()));
    let lowest = if lowest.is_finite() { lowest * 0.9 } else { 1.0 };
    let highest = largest(report.trials.iter().map(|trial| trial.p99_ms));
    let mut chart = ChartBuilder::on(&right)
        .caption("p99 of the lag against the rate, 40 ms one way", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d((lowest..fastest.max(lowest * 2.0)).log_scale(), (10.0..highest.max(100.0)).log_scale())?;
    chart.configure_mesh().max_light_lines(0).x_desc("revisions/s").y_desc("lag p99, ms").draw()?;
    for system in [System::MakeMirror, System::EtcdFerry] {
        let colour = colour(system);
        let points: Vec<(f64, f64)> = report
            .trials
            .iter()
            .filter(|trial| trial.system == Some(system))
            .map(|trial| (trial.rate as f64, trial.p99_ms))
            .collect();
        chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
        chart
            .draw_series(points.into_iter().map(|point| Circle::new(point, 4, colour.filled())))?
            .label(system.name())
            .legend(move |(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
    }
    chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
    area.present()?;
    Ok(())
}

/// The end of an axis: never zero.
fn largest(figures: impl Iterator<Item = f64>) -> f64 {
    figures.fold(0.0, f64::max).max(1.0) * 1.05
}
