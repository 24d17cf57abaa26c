//! Metrics whose labels change, such as a list of names: each call replaces the series of the call before. The recorder
//! behind the `metrics` macros keeps every series for ever.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{Mutex, PoisonError},
};

/// Series by metric and source.
static SERIES: Mutex<BTreeMap<(&'static str, String), String>> = Mutex::new(BTreeMap::new());

/// Publishes a gauge with these labels in place of the series that `source` published before.
///
/// `source`: what tells apart several publishers of a metric in one process. It is no label.
pub fn publish_info(source: &str, name: &'static str, labels: &[(&'static str, &str)], value: f64) {
    let mut line = format!("{name}{{");
    for (index, (label, value)) in labels.iter().enumerate() {
        let value = value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
        let comma = if index > 0 { "," } else { "" };
        // A string takes everything.
        let _ = write!(line, "{comma}{label}=\"{value}\"");
    }
    let _ = write!(line, "}} {value}");
    let mut series = SERIES.lock().unwrap_or_else(PoisonError::into_inner);
    series.insert((name, source.to_owned()), line);
}

/// All series in Prometheus' text format.
pub(crate) fn render(text: &mut String) {
    let series = SERIES.lock().unwrap_or_else(PoisonError::into_inner);
    let mut last = "";
    for ((name, _), line) in series.iter() {
        if *name != last {
            let _ = writeln!(text, "# TYPE {name} gauge");
            last = name;
        }
        let _ = writeln!(text, "{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_replaces_the_one_before() {
        publish_info("a", "athanor_test_info", &[("names", "x,y"), ("most", "8")], 1.5);
        publish_info("a", "athanor_test_info", &[("names", "a\"b\\"), ("most", "8")], 2.0);
        publish_info("b", "athanor_test_info", &[("names", "")], 3.0);
        let mut text = String::new();
        render(&mut text);
        let expected = "# TYPE athanor_test_info gauge\nathanor_test_info{names=\"a\\\"b\\\\\",most=\"8\"} 2\n\
            athanor_test_info{names=\"\"} 3\n";
        assert_eq!(text, expected);
    }
}
