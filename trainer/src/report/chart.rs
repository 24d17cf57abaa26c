//! Pictures of the report, as SVG.

use plotters::{
    chart::{ChartBuilder, ChartContext},
    coord::{Shift, cartesian::Cartesian2d, types::RangedCoordf64},
    drawing::DrawingArea,
    element::{Circle, EmptyElement, Rectangle, Text},
    prelude::{IntoDrawingArea, IntoFont, SVGBackend},
    series::LineSeries,
    style::{Color, RGBColor, ShapeStyle},
};

const SIZE: (u32, u32) = (420, 220);
const BLUE: RGBColor = RGBColor(37, 99, 235);
const GREY: RGBColor = RGBColor(203, 213, 225);
const TEXT: RGBColor = RGBColor(71, 85, 105);

/// A picture, or why there is none.
fn picture(draw: impl FnOnce(&mut String) -> Result<(), Box<dyn std::error::Error>>) -> String {
    let mut svg = String::new();
    match draw(&mut svg) {
        Ok(()) => svg,
        Err(error) => {
            tracing::warn!(%error, "a picture of the report could not be drawn");
            String::new()
        }
    }
}

/// A line over steps; `dots` marks the points themselves. Points that are not finite are left out.
pub fn line(points: &[(f64, f64)], y_name: &str, dots: bool) -> String {
    let points: Vec<(f64, f64)> = points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let Some((x, y)) = ranges(&points) else { return String::new() };
    picture(|svg| {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let mut chart = axes(&area, (x, y), ("step", y_name), (whole, |y| short(*y)))?;
        chart.draw_series(LineSeries::new(points.iter().copied(), ShapeStyle::from(&BLUE).stroke_width(2)))?;
        if dots {
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, BLUE.filled())))?;
        }
        area.present()?;
        drop(chart);
        drop(area);
        Ok(())
    })
}

/// Accuracy over confidence, a bar a bin, with the diagonal of a perfectly calibrated model. Bins are (lower, upper,
/// accuracy).
pub fn calibration(bins: &[(f64, f64, f64)]) -> String {
    let Some(lowest) = bins.first().map(|bin| bin.0) else { return String::new() };
    picture(|svg| {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let share = |number: &f64| format!("{}", (number * 100.0).round() / 100.0);
        let mut chart = axes(&area, ((lowest, 1.0), (0.0, 1.0)), ("confidence", "accuracy"), (share, share))?;
        chart.draw_series(bins.iter().map(|&(lower, upper, accuracy)| {
            Rectangle::new([(lower, 0.0), (upper, accuracy)], BLUE.mix(0.75).filled())
        }))?;
        chart.draw_series(LineSeries::new([(lowest, lowest), (1.0, 1.0)], TEXT.stroke_width(1)))?;
        area.present()?;
        drop(chart);
        drop(area);
        Ok(())
    })
}

/// Quality over megabytes, a named dot a form: (name, megabytes, quality).
pub fn forms(forms: &[(&str, f64, f64)], y_name: &str) -> String {
    let points: Vec<(f64, f64)> = forms.iter().map(|&(_, x, y)| (x, y)).filter(|(_, y)| y.is_finite()).collect();
    let Some(((left, right), y)) = ranges(&points) else { return String::new() };
    // Names stand to the right of their dots.
    let x = (left * 0.8, right + (right - left).max(right * 0.2) * 0.6);
    picture(|svg| {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let mut chart = axes(&area, (x, y), ("megabytes", y_name), (|x| format!("{x:.0}"), |y| short(*y)))?;
        chart.draw_series(LineSeries::new(points.iter().copied(), GREY.stroke_width(1)))?;
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 5, BLUE.filled())))?;
        chart.draw_series(std::iter::zip(forms, &points).map(|((name, ..), &point)| {
            EmptyElement::at(point)
                + Text::new((*name).to_owned(), (8, -6), ("sans-serif", 11).into_font().color(&TEXT))
        }))?;
        area.present()?;
        drop(chart);
        drop(area);
        Ok(())
    })
}

/// The result of each trial in the order of their beginnings, the chosen one filled; without those that have none.
pub fn trials(results: &[(Option<f64>, bool)], y_name: &str) -> String {
    let numbered =
        results.iter().zip(1..).filter_map(|(&(result, best), number)| Some((f64::from(number), result?, best)));
    let dots: Vec<(f64, f64, bool)> = numbered.filter(|(_, result, _)| result.is_finite()).collect();
    let points: Vec<(f64, f64)> = dots.iter().map(|&(x, y, _)| (x, y)).collect();
    let Some(((_, right), y)) = ranges(&points) else { return String::new() };
    picture(|svg| {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let words: (Words, Words) = (whole, |y| short(*y));
        let mut chart = axes(&area, ((0.5, right + 0.5), y), ("trial", y_name), words)?;
        chart.draw_series(dots.iter().map(|&(x, y, best)| {
            let style = if best { BLUE.filled() } else { BLUE.mix(0.5).stroke_width(2) };
            Circle::new((x, y), if best { 6 } else { 4 }, style)
        }))?;
        area.present()?;
        drop(chart);
        drop(area);
        Ok(())
    })
}

type Range = (f64, f64);
type Words = fn(&f64) -> String;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// A grid over two ranges, with the names of the axes and the words of their numbers.
fn axes<'a>(
    area: &Area<'a>,
    (x, y): (Range, Range),
    (x_name, y_name): (&str, &str),
    (x_text, y_text): (Words, Words),
) -> Result<Chart<'a>, Box<dyn std::error::Error>> {
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .x_label_area_size(34)
        .y_label_area_size(58)
        .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
    chart
        .configure_mesh()
        .bold_line_style(GREY.mix(0.7))
        .light_line_style(GREY.mix(0.0))
        .axis_style(GREY)
        .label_style(("sans-serif", 12, &TEXT))
        .x_desc(x_name)
        .y_desc(y_name)
        .x_label_formatter(&x_text)
        .y_label_formatter(&y_text)
        .draw()?;
    Ok(chart)
}

/// What the axes span: all points, with some air above and below.
fn ranges(points: &[(f64, f64)]) -> Option<(Range, Range)> {
    let first = points.first()?;
    let start = ((first.0, first.0), (first.1, first.1));
    let (x, y) =
        points.iter().fold(start, |(xs, ys), &(x, y)| ((xs.0.min(x), xs.1.max(x)), (ys.0.min(y), ys.1.max(y))));
    let air = ((y.1 - y.0) * 0.05).max(y.1.abs() * 0.01).max(1e-9);
    Some(((x.0, x.1.max(x.0 + 1.0)), (y.0 - air, y.1 + air)))
}

/// The number of a step or a trial; nothing for a place between two of them.
fn whole(number: &f64) -> String {
    if (number - number.round()).abs() < 1e-6 { format!("{number:.0}") } else { String::new() }
}

/// A number in a few characters.
fn short(number: f64) -> String {
    match number.abs() {
        0.0 => "0".into(),
        small if small < 1e-3 => format!("{number:.1e}"),
        small if small < 10.0 => format!("{number:.3}"),
        _ => format!("{number:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_svg_whatever_the_numbers() {
        for points in [vec![(1.0, 0.5)], vec![(1.0, 2.0), (2.0, 2.0)], vec![(1.0, 1e-7), (2.0, f64::NAN), (3.0, -5.0)]]
        {
            let svg = line(&points, "loss", true);
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        }
        // A grid of halves between two trials.
        let svg = trials(&[(Some(0.5), false), (Some(0.75), true)], "validation");
        for number in ["1", "2"] {
            assert_eq!(svg.lines().filter(|line| line.trim() == number).count(), 1, "{svg}");
        }
        assert!(calibration(&[(0.5, 0.6, 0.4), (0.6, 1.0, 1.0)]).contains("<rect"));
        assert!(forms(&[("trained", 91.0, 0.9), ("int8", 23.0, 0.89)], "accuracy").contains("int8"));
        assert_eq!(forms(&[], "accuracy"), "");
        assert_eq!(line(&[], "loss", false), "");
        assert_eq!(calibration(&[]), "");
    }
}
