use super::*;

fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

fn choose(logits: &[f32], sampling: &Sampling, prompt: &[u32], answer: &[u32]) -> u32 {
    let context = Context { prompt, answer, forbidden: &[], allowed: None };
    sample(logits, logits.len(), sampling, context).unwrap().token
}

/// Shares of the tokens over many seeds.
fn shares(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
    const DRAWS: u64 = 20_000;
    let mut counts = vec![0.0; logits.len()];
    for seed in 0..DRAWS {
        counts[choose(logits, &Sampling { seed, ..sampling.clone() }, &[], &[]) as usize] += 1.0 / DRAWS as f64;
    }
    counts
}

/// Softmax of `logits / temperature` over the tokens in `kept`, written from the definition.
fn expected(logits: &[f32], temperature: f64, kept: &[usize]) -> Vec<f64> {
    let exponents: Vec<f64> = (0..logits.len())
        .map(|index| if kept.contains(&index) { (f64::from(logits[index]) / temperature).exp() } else { 0.0 })
        .collect();
    let sum: f64 = exponents.iter().sum();
    exponents.iter().map(|exponent| exponent / sum).collect()
}

#[test]
fn temperature_zero_chooses_the_highest_logit_and_the_first_of_equals() {
    assert_eq!(choose(&[0.0, 3.0, 3.0, -1.0], &greedy(), &[], &[]), 1);
}

#[test]
fn draws_follow_the_definitions() {
    // Probabilities at temperature 1: 0.5, 0.2, 0.15, 0.1, 0.05.
    let logits = [0.5f32, 0.2, 0.15, 0.1, 0.05].map(f32::ln);
    let base = Sampling::default();
    for (case, sampling, temperature, kept) in [
        ("all", base.clone(), 1.0, &[0, 1, 2, 3, 4][..]),
        ("hot", Sampling { temperature: 2.0, ..base.clone() }, 2.0, &[0, 1, 2, 3, 4]),
        ("cold", Sampling { temperature: 0.5, ..base.clone() }, 0.5, &[0, 1, 2, 3, 4]),
        ("top_k 2", Sampling { top_k: 2, ..base.clone() }, 1.0, &[0, 1]),
        ("top_k beyond the vocabulary", Sampling { top_k: 9, ..base.clone() }, 1.0, &[0, 1, 2, 3, 4]),
        ("top_p reached by two", Sampling { top_p: 0.69, ..base.clone() }, 1.0, &[0, 1]),
        ("top_p just above two", Sampling { top_p: 0.71, ..base.clone() }, 1.0, &[0, 1, 2]),
        ("a tiny top_p keeps one", Sampling { top_p: 1e-6, ..base.clone() }, 1.0, &[0]),
        // Renormalised after top_k: 0.5 / 0.85 = 0.588 < 0.6.
        ("top_p after top_k", Sampling { top_k: 3, top_p: 0.6, ..base.clone() }, 1.0, &[0, 1]),
        ("min_p", Sampling { min_p: 0.25, ..base.clone() }, 1.0, &[0, 1, 2]),
    ] {
        let (found, wanted) = (shares(&logits, &sampling), expected(&logits, temperature, kept));
        for (index, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            // Five standard deviations of a share of 20,000 draws are below 0.018.
            assert!((found - wanted).abs() < 0.018, "{case}: token {index} has {found}, not {wanted}");
            assert!(*wanted > 0.0 || *found == 0.0, "{case}: token {index} was cut but drawn");
        }
    }
}

#[test]
fn penalties_and_bias_follow_openai_and_hugging_face() {
    let logits = [2.0, 1.5, -1.0, 0.5];
    for (case, sampling, prompt, answer, token) in [
        ("none", greedy(), &[0u32][..], &[0u32, 0][..], 0),
        ("repetition counts the prompt", Sampling { repetition_penalty: 1.5, ..greedy() }, &[0], &[], 1),
        ("presence does not count the prompt", Sampling { presence_penalty: 1.0, ..greedy() }, &[0], &[], 0),
        ("presence counts once", Sampling { presence_penalty: 0.4, ..greedy() }, &[], &[0, 0, 0], 0),
        ("frequency counts each", Sampling { frequency_penalty: 0.2, ..greedy() }, &[], &[0, 0, 0], 1),
        ("bias", Sampling { logit_bias: vec![(3, 2.0)], ..greedy() }, &[], &[], 3),
        ("tokens outside the vocabulary", Sampling { repetition_penalty: 1.5, ..greedy() }, &[9], &[9], 0),
    ] {
        assert_eq!(choose(&logits, &sampling, prompt, answer), token, "{case}");
    }
    let sampling = Sampling { repetition_penalty: 2.0, presence_penalty: 0.25, frequency_penalty: 0.5, ..greedy() };
    let context = Context { prompt: &[2], answer: &[0, 0], forbidden: &[3], allowed: None };
    assert_eq!(*scores(&logits, &sampling, context), [1.0 - 0.25 - 1.0, 1.5, -2.0, f32::NEG_INFINITY]);
}

#[test]
fn log_probabilities_are_those_of_the_unmodified_logits() {
    let logits = [0.5f32, 0.2, 0.2, 0.1].map(f32::ln);
    let sampling = Sampling { logit_bias: vec![(3, 50.0)], logprobs: Some(2), ..greedy() };
    let sampled =
        sample(&logits, 4, &sampling, Context { prompt: &[], answer: &[], forbidden: &[], allowed: None }).unwrap();
    let found = sampled.logprobs.unwrap();
    assert_eq!(sampled.token, 3);
    assert!((found.chosen - 0.1f32.ln()).abs() < 1e-6);
    assert_eq!(found.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [0, 1]);
    assert!((found.top[1].1 - 0.2f32.ln()).abs() < 1e-6);
    let none = Sampling { logprobs: Some(0), ..greedy() };
    let sampled =
        sample(&logits, 4, &none, Context { prompt: &[], answer: &[], forbidden: &[], allowed: None }).unwrap();
    assert_eq!(sampled.logprobs.unwrap().top, []);
}

#[test]
fn the_draw_depends_on_seed_and_position_alone() {
    let logits = vec![0.0; 1000];
    let at = |seed, length| choose(&logits, &Sampling { seed, ..Sampling::default() }, &vec![0; length], &[]);
    assert_eq!(at(7, 3), at(7, 3));
    assert_ne!(at(7, 3), at(8, 3));
    assert_ne!(at(7, 3), at(7, 4));
    // The same position counts whether its tokens are of the prompt or of the answer.
    let sampling = Sampling { seed: 7, ..Sampling::default() };
    assert_eq!(choose(&logits, &sampling, &[0, 0], &[0]), at(7, 3));
}

#[test]
fn the_exponential_is_that_of_the_standard_library() {
    for step in 0..87_000 {
        let x = -step as f32 / 1000.0;
        let (found, exact) = (f64::from(exponential(x)), f64::from(x).exp());
        assert!((found - exact).abs() <= exact * 5e-7, "e^{x}: {found} instead of {exact}");
    }
    assert_eq!([exponential(-88.0), exponential(f32::NEG_INFINITY)], [0.0, 0.0]);
}

/// The draw by its definition, in FP64.
fn drawn(scores: &[f32], sampling: &Sampling, position: usize) -> usize {
    let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |score: f32| (f64::from(score - highest) / f64::from(sampling.temperature)).exp();
    let mut kept: Vec<(usize, f64)> = scores.iter().map(|&score| weight(score)).enumerate().collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    kept.retain(|(_, weight)| *weight >= f64::from(sampling.min_p));
    kept.truncate(if sampling.top_k == 0 { kept.len() } else { sampling.top_k });
    let enough = f64::from(sampling.top_p) * kept.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    let reached = kept.iter().position(|(_, weight)| {
        sum += weight;
        sum >= enough
    });
    kept.truncate(reached.map_or(kept.len(), |index| index + 1));
    kept.sort_by_key(|(index, _)| *index);
    let mut left = uniform(sampling.seed, position) * kept.iter().map(|(_, weight)| weight).sum::<f64>();
    let chosen = kept.iter().find(|(_, weight)| {
        left -= weight;
        left < 0.0
    });
    chosen.or(kept.last()).unwrap().0
}

#[test]
fn cuts_alone_and_together_draw_by_their_definition() {
    let scores: Vec<f32> = (0..500).map(|index| ((index * 7919) % 500) as f32 / 60.0).collect();
    for (top_k, top_p, min_p) in
        [(0, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.5, 0.0), (40, 0.9, 0.0), (0, 0.6, 1e-3), (0, 0.9, 0.1)]
    {
        let sampling = Sampling { top_k, top_p, min_p, temperature: 0.8, seed: 3, ..Sampling::default() };
        for position in 0..400 {
            let (found, expected) =
                (draw(&scores, 499.0 / 60.0, &sampling, position), drawn(&scores, &sampling, position));
            assert_eq!(found, expected, "{top_k} {top_p} {min_p}, position {position}");
        }
    }
}

/// As `draw` picks among all tokens.
fn picked(weights: &[f32], number: f64) -> usize {
    let part = |index: usize| {
        let mut part = [0.0; PART];
        std::iter::zip(&mut part, &weights[index * PART..]).for_each(|(to, from)| *to = *from);
        part
    };
    let sums: Vec<f64> = (0..weights.len().div_ceil(PART)).map(|index| sum(&part(index))).collect();
    pick(&sums, part, number)
}

/// 0.3 of the weight is spread over many light tokens, so that the running sum crosses many parts.
#[test]
fn a_draw_over_many_tokens_follows_their_weights() {
    let weights: Vec<f32> = (0..1000).map(|index| if index == 700 { 700.0 } else { 300.0 / 999.0 }).collect();
    let draws: Vec<usize> = (0..2000).map(|step| picked(&weights, f64::from(step) / 2000.0)).collect();
    assert!(draws.is_sorted());
    assert!((draws.iter().filter(|&&index| index == 700).count() as i32 - 1400).abs() <= 1);
    assert_eq!((picked(&weights, 0.0), picked(&weights, 0.999_999)), (0, 999));
    assert_eq!(picked(&[0.0, 0.5, 0.0], 0.999_999_999), 1);
    let mut late = vec![0.0; 300];
    late[200] = 1.0;
    assert_eq!([picked(&late, 0.0), picked(&late, 0.999_999_999)], [200, 200]);
}

/// Also of more tokens than are kept at a time, equal ones included.
#[test]
fn the_heaviest_tokens_are_those_of_a_sort() {
    let scores: Vec<f32> = (0..5000).map(|index| ((index * 7919) % 1000) as f32 / 200.0).collect();
    for top_k in [0, 1, 2, 40, 700] {
        for (top_p, min_p) in [(1.0, 0.3), (0.9, 0.0), (0.3, 0.0), (0.5, 0.1)] {
            let sampling = Sampling { top_k, top_p, min_p, seed: 5, ..Sampling::default() };
            for position in 0..100 {
                let (found, expected) =
                    (draw(&scores, 999.0 / 200.0, &sampling, position), drawn(&scores, &sampling, position));
                assert_eq!(found, expected, "{top_k} {top_p} {min_p}, position {position}");
            }
        }
    }
}

/// A temperature whose inverse is infinite chooses the highest.
#[test]
fn the_smallest_temperature_is_like_none() {
    let sampling = Sampling { temperature: f32::from_bits(1), ..Sampling::default() };
    assert_eq!(choose(&[0.0, 1.0, 0.5], &sampling, &[], &[]), 1);
}

#[test]
fn a_survey_finds_the_highest_and_what_is_not_finite() {
    for length in [1, 15, 16, 33, 100] {
        for place in 0..length {
            let mut scores: Vec<f32> = (0..length).map(|index| -(index as f32)).collect();
            scores[place] = 7.0;
            assert_eq!(survey(&scores), (7.0, true), "{place} of {length}");
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                scores[place] = bad;
                assert!(!survey(&scores).1, "{bad} at {place} of {length}");
            }
        }
    }
    assert_eq!(survey(&[f32::NEG_INFINITY; 3]).0, f32::NEG_INFINITY);
}

#[test]
fn logits_that_cannot_be_sampled_are_errors() {
    let context = Context { prompt: &[], answer: &[], forbidden: &[0, 1], allowed: None };
    for (logits, error) in [
        (vec![0.0], LogitsError::Length { found: 1, wanted: 2 }),
        (vec![0.0, f32::NAN], LogitsError::NotFinite { token: 1 }),
        (vec![f32::INFINITY, 0.0], LogitsError::NotFinite { token: 0 }),
        (vec![0.0, 0.0], LogitsError::NothingLeft),
    ] {
        assert_eq!(sample(&logits, 2, &Sampling::default(), context), Err(error));
    }
}

#[test]
fn values_out_of_range_are_refused_with_their_field() {
    let base = Sampling::default();
    for (field, sampling) in [
        ("temperature", Sampling { temperature: f32::NAN, ..base.clone() }),
        ("temperature", Sampling { temperature: -0.1, ..base.clone() }),
        ("temperature", Sampling { temperature: f32::INFINITY, ..base.clone() }),
        ("top_p", Sampling { top_p: 0.0, ..base.clone() }),
        ("top_p", Sampling { top_p: 1.1, ..base.clone() }),
        ("min_p", Sampling { min_p: -0.1, ..base.clone() }),
        ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..base.clone() }),
        ("presence_penalty", Sampling { presence_penalty: 2.1, ..base.clone() }),
        ("frequency_penalty", Sampling { frequency_penalty: -2.1, ..base.clone() }),
        ("logit_bias", Sampling { logit_bias: vec![(4, 0.0)], ..base.clone() }),
        ("logit_bias", Sampling { logit_bias: vec![(3, f32::NAN)], ..base.clone() }),
        ("top_logprobs", Sampling { logprobs: Some(21), ..base.clone() }),
    ] {
        assert_eq!(sampling.check(4).unwrap_err().field, field, "{sampling:?}");
    }
    assert_eq!(base.check(4), Ok(()));
}

#[test]
fn only_tokens_of_the_constraint_are_chosen_and_log_probabilities_are_the_models_own() {
    let logits = [5.0, 4.0, 3.0, 2.0];
    let allowed = TokenSet::from_words(vec![0b1100]);
    let context = Context { prompt: &[], answer: &[], forbidden: &[], allowed: Some(&allowed) };
    let sampling = Sampling { logprobs: Some(1), ..greedy() };
    let sampled = sample(&logits, 4, &sampling, context).unwrap();
    assert_eq!(sampled.token, 2);
    let logprobs = sampled.logprobs.unwrap();
    assert_eq!(logprobs.top[0].0, 0, "the most probable token of the model");
    assert!((logprobs.top[0].1 - logprobs.chosen - 2.0).abs() < 1e-5);
    for seed in 0..100 {
        let hot = Sampling { temperature: 2.0, top_k: 2, seed, ..Sampling::default() };
        assert!([2, 3].contains(&sample(&logits, 4, &hot, context).unwrap().token));
    }
    // Not even a bias brings back the others, and an empty set leaves nothing.
    let biased = Sampling { logit_bias: vec![(0, 100.0)], ..greedy() };
    assert_eq!(sample(&logits, 4, &biased, context).unwrap().token, 2);
    let nothing = TokenSet::from_words(Vec::new());
    let context = Context { allowed: Some(&nothing), ..context };
    assert_eq!(sample(&logits, 4, &greedy(), context), Err(LogitsError::NothingLeft));
}
