use super::*;
use crate::cloudevents::{arrival, event_time};
use athanor_contract::{artifact::TextReference, event::GenerationInput};
use proptest::prelude::*;
use rdkafka::message::Timestamp as RecordTime;

const LABELS: [&str; 2] = ["negative", "positive"];

fn reference() -> Reference {
    Reference::Classes(ClassReference {
        labels: LABELS.map(String::from).to_vec(),
        predicted: vec![100, 100],
        confidences: (0..200).map(|i| 0.5 + i as f32 / 400.0).collect(),
        correct: 180,
        rows: 200,
    })
}

fn window() -> Window {
    Window::new(
        "r2",
        Some(reference()),
        MonitorSpec { window_predictions: 100, minimum_labels: 20, ..Default::default() },
        100,
    )
}

fn event(id: String, second: i64, data: EventData) -> Event {
    let time = jiff::Timestamp::from_second(1_800_000_000 + second).expect("in range").to_string();
    Event { id, source: "/athanor/ns/d".into(), time, trace_parent: None, data }
}

/// Prediction number `at`, as the reference distributes them.
fn prediction(at: i64, revision: &str) -> Event {
    answer(at, revision, LABELS[at as usize % 2], usual_confidence(at))
}

fn answer(at: i64, revision: &str, label: &str, confidence: f32) -> Event {
    let data = EventData::Prediction(Prediction {
        request_id: format!("q{at}"),
        index: 0,
        revision: revision.into(),
        text: "text".into(),
        label: label.into(),
        confidence,
        latency_ms: 1.0,
    });
    event(format!("q{at}/0"), at, data)
}

fn feedback(at: i64, label: &str) -> Event {
    judged("f", at, Judgement::ExpectedLabel(label.into()))
}

fn judged(id: &str, at: i64, judgement: Judgement) -> Event {
    let request_id = format!("q{at}");
    event(
        format!("{id}{at}"),
        at + 1,
        EventData::Feedback(Feedback { request_id, index: 0, judgement, comment: None, caller: None }),
    )
}

/// A generated answer, number `at`.
fn generation(at: i64) -> Event {
    let data = EventData::Generation(Generation {
        request_id: format!("q{at}"),
        index: 0,
        revision: "r2".into(),
        adapter: None,
        input: GenerationInput::Prompt("List the entities".into()),
        answer: "[Bank - ORGANIZATION]".into(),
        finish_reason: "stop".into(),
        usage: None,
        tool_calls: Vec::new(),
        mean_log_probability: None,
        latency_ms: 1.0,
    });
    event(format!("q{at}/0"), at, data)
}

fn text_window() -> Window {
    let reference = TextReference { answer_tokens: vec![], mean_log_probabilities: vec![], correct: 180, rows: 200 };
    Window::new(
        "r2",
        Some(Reference::Text(reference)),
        MonitorSpec { window_predictions: 100, minimum_labels: 20, ..Default::default() },
        100,
    )
}

/// Feeds events as partition 0 from offset 0 on.
fn feed(window: &mut Window, events: impl IntoIterator<Item = Event>) {
    for (offset, event) in events.into_iter().enumerate() {
        observe(window, 0, offset as i64, Some(&event));
    }
}

/// A record that arrived at the event's own time.
fn observe(window: &mut Window, partition: i32, offset: i64, event: Option<&Event>) -> Observed {
    window.observe(partition, offset, event.map_or(Timestamp::MIN, event_time), event)
}

#[test]
fn ranges_begin_with_the_revisions_first_event_in_each_partition() {
    let mut window = window();
    let steps = [
        (0, 10, Some(prediction(0, "r1")), Observed::Prediction),
        (0, 11, Some(prediction(1, "r2")), Observed::Prediction),
        (1, 7, Some(prediction(2, "r2")), Observed::Prediction),
        (0, 12, Some(prediction(3, "r1")), Observed::Prediction),
        (0, 13, Some(prediction(1, "r2")), Observed::Duplicate),
        (2, 5, Some(feedback(1, "positive")), Observed::Feedback),
        (0, 14, None, Observed::Malformed),
    ];
    for (partition, offset, event, expected) in steps {
        assert_eq!(observe(&mut window, partition, offset, event.as_ref()), expected);
    }
    let status = window.status();
    let ranges: Vec<_> = status.ranges.iter().map(|range| (range.partition, range.begin, range.end)).collect();
    assert_eq!(ranges, [(0, 11, 15), (1, 7, 8)]);
    assert_eq!((status.revision.as_str(), status.predictions, status.labelled), ("r2", 2, 1));
}

/// Confidences as in the reference, in another order.
fn usual_confidence(at: i64) -> f32 {
    0.5 + (at * 37 % 100) as f32 / 200.0
}

/// Each prediction with feedback after all of them; every `wrong_every`th says that the other label was right.
fn labelled(predictions: Vec<Event>, wrong_every: usize) -> Vec<Event> {
    let mut events = predictions.clone();
    for (at, event) in predictions.iter().enumerate() {
        let EventData::Prediction(prediction) = &event.data else { panic!("only predictions") };
        let other = LABELS[usize::from(prediction.label == LABELS[0])];
        events.push(feedback(at as i64, if at % wrong_every == 0 { other } else { &prediction.label }));
    }
    events
}

#[test]
fn verdicts() {
    let usual = |range: std::ops::Range<i64>| range.map(|at| prediction(at, "r2")).collect::<Vec<_>>();
    let all = |answer: fn(i64) -> Event| (0..100).map(answer).collect::<Vec<_>>();
    let both_moved = all(|at| answer(at, "r2", "positive", 0.51));
    let cases = [
        ("too few", usual(0..99), Verdict::Unknown),
        ("a full window like the reference", usual(0..100), Verdict::Stable),
        ("only labels moved", all(|at| answer(at, "r2", "positive", usual_confidence(at))), Verdict::Stable),
        ("only confidences moved", all(|at| answer(at, "r2", LABELS[at as usize % 2], 0.51)), Verdict::Stable),
        ("both moved", both_moved.clone(), Verdict::Drifted),
        ("both moved, to a label the reference lacks", all(|at| answer(at, "r2", "new", 0.51)), Verdict::Drifted),
        ("a later window like the reference", [both_moved.clone(), usual(100..200)].concat(), Verdict::Stable),
        ("half of the answers are wrong", labelled(usual(0..100), 2), Verdict::Drifted),
        ("half are wrong, but they are too few", labelled(usual(0..19), 2), Verdict::Unknown),
        ("a tenth is wrong, as in the reference", labelled(usual(0..100), 10), Verdict::Stable),
        ("with enough labels the distributions do not matter", labelled(both_moved, 10), Verdict::Stable),
        ("another revision's predictions", all(|at| answer(at, "r1", "positive", 0.51)), Verdict::Unknown),
    ];
    for (name, events, expected) in cases {
        let mut window = window();
        feed(&mut window, events);
        assert_eq!(window.status().verdict, expected, "{name}: {:?}", window.status());
    }
}

#[test]
fn feedback_before_its_prediction_counts() {
    let mut window = window();
    feed(&mut window, [feedback(1, "positive"), prediction(1, "r2"), feedback(1, "negative")]);
    assert_eq!(window.status().labelled, 1);
}

#[test]
fn without_a_reference_only_counts_are_known() {
    let mut window = Window::new("r2", None, MonitorSpec { window_predictions: 50, ..Default::default() }, 100);
    feed(&mut window, (0..60).map(|at| prediction(at, "r2")));
    let status = window.status();
    assert_eq!((status.verdict, status.predictions, status.statistics.len()), (Verdict::Unknown, 60, 0));
    assert_eq!(window.window_predictions(), 50);
}

#[test]
fn an_event_from_the_future_does_not_own_the_window() {
    let mut future = answer(0, "r2", "new", 0.51);
    future.time = "2100-01-01T00:00:00Z".into();
    let second = |at: i64| Timestamp::from_second(1_800_000_000 + at).expect("in range");
    let of_broker = |at| RecordTime::LogAppendTime(second(at).as_millisecond());
    let of_sender = |_: i64| RecordTime::CreateTime(event_time(&future).as_millisecond());
    let records: [&dyn Fn(i64) -> RecordTime; 2] = [&of_broker, &of_sender];
    for record in records {
        let mut window = window();
        let is_there = |window: &Window| window.newest.values().any(|(label, _)| label == "new");
        let mut feed = |at: i64, event: &Event| {
            window.observe(0, at, arrival(record(at), event, second(at)), Some(event));
            is_there(&window)
        };
        assert!(feed(0, &future));
        let after: Vec<bool> = (1..=100).map(|at| feed(at, &prediction(at, "r2"))).collect();
        // It leaves a window of 100 with the hundredth prediction after it.
        assert_eq!(after.iter().filter(|is_there| **is_there).count(), 99);
    }
}

#[test]
fn corrections_of_generated_answers_are_judged_as_labels_are() {
    let correction = |at: i64, text: &str| judged("f", at, Judgement::ExpectedText(text.into()));
    // White space does not make another answer.
    let same = |at| correction(at, "[Bank -\n ORGANIZATION]");
    let cases = [
        ("too few", 19, 2, Verdict::Unknown),
        ("a tenth is corrected, as in the reference", 600, 10, Verdict::Stable),
        ("half is corrected", 120, 2, Verdict::Drifted),
    ];
    for (name, answers, wrong_every, expected) in cases {
        let mut window = text_window();
        let corrections =
            (0..answers).map(|at| if at % wrong_every == 0 { correction(at, "No entities found") } else { same(at) });
        feed(&mut window, (0..answers).map(generation).chain(corrections));
        let status = window.status();
        assert_eq!((status.verdict, status.labelled), (expected, answers as u64), "{name}: {status:?}");
        assert!(status.statistics.iter().all(|statistic| statistic.name == LABELLED_ACCURACY), "{status:?}");
    }
}

#[test]
fn ratings_are_compared_with_the_first_ratings_of_the_revision() {
    let rating = |at: i64, good: bool| {
        judged("s", at, Judgement::Rating(if good { Rating::Positive } else { Rating::Negative }))
    };
    // One in ten of the first twenty ratings is negative; they are the reference.
    let first = || (0..20).map(|at| rating(at, at % 10 != 0));
    let cases: [(&str, Vec<Event>, Verdict); 3] = [
        ("the reference alone", first().collect(), Verdict::Unknown),
        ("as at first", first().chain((20..620).map(|at| rating(at, at % 10 != 0))).collect(), Verdict::Stable),
        (
            "half is negative now",
            first().chain((20..620).map(|at| rating(at, at % 2 == 0))).collect(),
            Verdict::Drifted,
        ),
    ];
    for (name, ratings, expected) in cases {
        let mut window = text_window();
        feed(&mut window, (0..620).map(generation).chain(ratings));
        let status = window.status();
        assert_eq!((status.verdict, status.labelled), (expected, 0), "{name}: {status:?}");
    }
    // A second rating of one answer does not count.
    let mut window = text_window();
    let repeated = (0..40).map(|at| judged(&format!("again{at}-"), 0, Judgement::Rating(Rating::Negative)));
    feed(&mut window, [generation(0)].into_iter().chain(repeated));
    assert!(window.status().statistics.is_empty());
}

#[test]
fn answers_of_another_adapter_do_not_count() {
    let mut window = text_window();
    let selected = |at| {
        let mut event = generation(at);
        if let EventData::Generation(generation) = &mut event.data {
            generation.adapter = Some("legal".into());
        }
        event
    };
    feed(&mut window, [generation(0), selected(1), generation(2)]);
    assert_eq!(window.status().predictions, 2);
}

#[test]
fn labels_that_confirm_no_answer_are_noticed() {
    let mut window = window();
    feed(&mut window, (0..19).flat_map(|at| [prediction(at, "r2"), feedback(at, "neither")]));
    assert!(!window.has_only_mistakes(), "too few to say");
    feed(&mut window, [prediction(19, "r2"), feedback(19, "neither")]);
    assert!(window.has_only_mistakes());
    feed(&mut window, [prediction(20, "r2"), feedback(20, LABELS[0])]);
    assert_eq!((window.has_only_mistakes(), window.status().labelled), (false, 21));
}

#[test]
fn later_labels_withdraw_a_verdict() {
    let mut window = window();
    let bad = |range: std::ops::Range<i64>| range.flat_map(|at| [prediction(at, "r2"), feedback(at, "neither")]);
    let good = |range: std::ops::Range<i64>| {
        range.flat_map(|at| [prediction(at, "r2"), feedback(at, LABELS[at as usize % 2])]).collect::<Vec<_>>()
    };
    feed(&mut window, bad(0..40));
    assert_eq!(window.status().verdict, Verdict::Drifted);
    feed(&mut window, good(40..100));
    assert_eq!(window.status().verdict, Verdict::Drifted, "sixty answers may be chance");
    feed(&mut window, good(100..400));
    assert_eq!(window.status().verdict, Verdict::Stable);
    feed(&mut window, bad(400..440));
    assert_eq!(window.status().verdict, Verdict::Drifted, "a second fall is found as the first was");
}

#[test]
fn one_caller_alone_decides_nothing_beyond_its_share() {
    let by = |caller: &str, at: i64, label: &str| {
        let mut event = feedback(at, label);
        let EventData::Feedback(feedback) = &mut event.data else { panic!("feedback") };
        feedback.caller = Some(caller.into());
        event
    };
    let spec = MonitorSpec { window_predictions: 100, minimum_labels: 20, ..Default::default() };
    let mut window = Window::new("r2", Some(reference()), spec, 25);
    // A hostile caller has as many answers as it likes, and says that all of them are wrong; three others agree with each of theirs.
    let events = (0..2_000).flat_map(|at| {
        let honest = ["a", "b", "c"][at as usize % 3];
        let verdict = if at % 4 == 0 { by(honest, at, LABELS[at as usize % 2]) } else { by("hostile", at, "neither") };
        [prediction(at, "r2"), verdict]
    });
    feed(&mut window, events);
    let status = window.status();
    // 500 honest labels, and at most a third as many hostile ones.
    assert!((500..=670).contains(&status.labelled), "{status:?}");
}

#[test]
fn published_drift_survives_a_restart_under_the_same_threshold() {
    let mut drifted = window();
    feed(&mut drifted, (0..40).map(|at| prediction(at, "r2")).chain((0..40).map(|at| feedback(at, "neither"))));
    let published = drifted.status();
    assert_eq!(published.verdict, Verdict::Drifted);
    let mut same = window();
    same.resume(&published);
    assert_eq!(same.status().verdict, Verdict::Drifted);
    let other_spec = MonitorSpec { accuracy_loss: Decimal::new(0.3).expect("finite"), ..Default::default() };
    for mut other in [
        Window::new("r3", Some(reference()), MonitorSpec::default(), 100),
        Window::new("r2", Some(reference()), other_spec, 100),
    ] {
        other.resume(&published);
        assert_eq!(other.status().verdict, Verdict::Unknown);
    }
}

proptest! {
    /// Rebuilding from Kafka interleaves the partitions in another way; windows and counts must not change.
    #[test]
    fn the_interleaving_of_partitions_does_not_matter(picks in prop::collection::vec(any::<bool>(), 300)) {
        let partition = |odd: i64| (0..150).map(move |at| prediction(2 * at + odd, "r2")).collect::<Vec<_>>();
        let partitions = [partition(0), partition(1)];
        let mut next = [0, 0];
        let mut mixed = window();
        for pick in picks.into_iter().chain([false; 150]).chain([true; 150]) {
            let which = usize::from(pick);
            if let Some(event) = partitions[which].get(next[which]) {
                observe(&mut mixed, which as i32, next[which] as i64, Some(event));
                next[which] += 1;
            }
        }
        let mut straight = window();
        for (which, events) in partitions.iter().enumerate() {
            for (offset, event) in events.iter().enumerate() {
                observe(&mut straight, which as i32, offset as i64, Some(event));
            }
        }
        prop_assert_eq!(mixed.status(), straight.status());
    }
}
