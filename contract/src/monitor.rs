//! The monitor's configuration, which the operator mounts, and the verdict that it publishes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Decimal, serve::EventsConfig, train::OffsetRange};

/// Mounted as `monitor.json` into `athanor-monitor`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MonitorConfig {
    pub namespace: String,
    pub deployment: String,
    pub events: EventsConfig,
    /// Artifact folders of the revisions that may answer: the reference of each is read from there.
    pub revisions: Vec<MonitoredRevision>,
    pub windows: MonitorSpec,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MonitoredRevision {
    pub name: String,
    pub model_uri: String,
}

/// Thresholds beyond which a model is considered stale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MonitorSpec {
    /// Number of predictions in a window.
    #[schemars(range(min = 50, max = 1_000_000))]
    pub window_predictions: u32,
    /// Threshold of the population stability index of predicted labels. Without enough labelled requests, a window counts
    /// as drifted above it if its tests are below confidencePValue as well.
    pub prediction_psi: Decimal,
    /// Threshold of the p-values by which a window's labels and confidences are compared with those of the test rows. A
    /// window counts as drifted if both are below it.
    pub confidence_p_value: Decimal,
    /// Loss of accuracy on labelled requests that shall be found soonest. The accuracy is compared with a lower bound
    /// (99 %) of that on the test rows.
    pub accuracy_loss: Decimal,
    /// Mean number of labelled requests, at least, between two false alarms of a model that has not become worse. The
    /// default is one false alarm a year at 10,000 labelled requests a day.
    #[schemars(range(min = 1_000, max = 1_000_000_000_000_u64))]
    pub average_run_length: u64,
    /// Number of labelled requests that a verdict on accuracy requires.
    #[schemars(range(min = 10, max = 1_000_000))]
    pub minimum_labels: u32,
}

impl Default for MonitorSpec {
    fn default() -> Self {
        let decimal = |value| Decimal::new(value).expect("a finite constant");
        Self {
            window_predictions: 500,
            prediction_psi: decimal(0.2),
            confidence_p_value: decimal(0.001),
            accuracy_loss: decimal(0.05),
            average_run_length: 3_650_000,
            minimum_labels: 100,
        }
    }
}

/// `status.monitor` of a ModelDeployment. Only the monitor writes it (field manager `athanor-monitor`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MonitorStatus {
    /// Revision that the statistics describe: the one with the most traffic.
    #[serde(default)]
    pub revision: String,
    /// Kafka topic that verdict, counts and ranges are about.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub topic: String,
    /// Verdict on whether the model is stale.
    pub verdict: Verdict,
    /// Statistics of the newest window, with their thresholds.
    #[serde(default)]
    pub statistics: Vec<Statistic>,
    /// Number of predictions since the revision received all traffic.
    #[serde(default)]
    pub predictions: u64,
    /// Number of these predictions that have feedback.
    #[serde(default)]
    pub labelled: u64,
    /// Offset ranges of the events since the revision received all traffic: the rows of a retraining.
    #[serde(default)]
    pub ranges: Vec<OffsetRange>,
    /// Time of the verdict, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Verdict {
    /// There are too few events so far.
    #[default]
    Unknown,
    /// No statistic is beyond its threshold.
    Stable,
    /// The accuracy on labelled requests has fallen, or, with too few labels, both distributions have drifted.
    Drifted,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Statistic {
    /// Name of the statistic: PredictionPSI, ConfidenceKS, LabelledAccuracy or PositiveRatings.
    pub name: String,
    /// Value in the newest window.
    pub value: Decimal,
    /// Threshold beyond which it has drifted.
    pub threshold: Decimal,
    /// Whether the value is beyond the threshold.
    pub drifted: bool,
}
