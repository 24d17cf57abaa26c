//! Rules that the API server checks as well, as CEL expressions, by the part of the specification they are about. The
//! Rust rule that mirrors each is in the file that the comment names; rules of a search are mirrored by the search crate.

use super::rule::Rule;

// compress.rs
pub const PRUNE_OR_QUANTIZE: Rule =
    Rule::new("has(self.prune) != has(self.quantize)", "set exactly one of prune and quantize");
pub const SPARSITY_OR_TWO_OF_FOUR: Rule = Rule::new(
    "has(self.sparsityPercent) != (has(self.twoOfFour) && self.twoOfFour)",
    "set exactly one of sparsityPercent and twoOfFour",
);

// data.rs
pub const URI_OR_KAFKA: Rule = Rule::new("has(self.uri) != has(self.kafka)", "set exactly one of uri and kafka");
pub const ONE_SOURCE_WITHOUT_PART: Rule =
    Rule::new("self.sources.exists(s, !has(s.part))", "at least one source must have no part: its rows are trained on");
pub const MESSAGES_OR_PROMPT: Rule =
    Rule::new("!(has(self.messages) && has(self.prompt))", "set messages, or prompt and completion, not both");
pub const PROMPT_AND_COMPLETION: Rule =
    Rule::new("has(self.prompt) == has(self.completion)", "prompt and completion require each other");
pub const BEGIN_BEFORE_END: Rule = Rule::new("self.begin <= self.end", "begin must not be after end");
pub const SPLIT_LEAVES_ROWS: Rule = Rule::new(
    "self.validationPercent + self.testPercent < 100",
    "validationPercent and testPercent leave no rows to train on",
);
pub const LENGTHS_IN_ORDER: Rule = Rule::new(
    "!has(self.minimumLength) || !has(self.maximumLength) || self.minimumLength <= self.maximumLength",
    "minimumLength must not be above maximumLength",
);
pub const ENDPOINT_OR_TEACHER: Rule =
    Rule::new("has(self.endpoint) != has(self.teacher)", "set exactly one of endpoint and teacher");
pub const COST_NEEDS_PRICES: Rule = Rule::new(
    "!has(self.maximumCost) || (has(self.inputTokenPrice) && has(self.outputTokenPrice))",
    "maximumCost requires inputTokenPrice and outputTokenPrice",
);
// Bounds of decimals: they travel as strings, which a schema cannot bound.
pub const FROM_0_TO_1: Rule = Rule::new("double(self) >= 0.0 && double(self) <= 1.0", "must be between 0 and 1");
pub const FROM_0_TO_2: Rule = Rule::new("double(self) >= 0.0 && double(self) <= 2.0", "must be between 0 and 2");
pub const FROM_HALF_TO_1: Rule = Rule::new("double(self) >= 0.5 && double(self) <= 1.0", "must be between 0.5 and 1");

// evaluate.rs
pub const GAIN_NEEDS_BASELINE: Rule = Rule::new(
    "self.model.task == 'CausalLanguageModel' || !has(self.evaluate) || !has(self.evaluate.gates) || \
     has(self.evaluate.baseline) || self.evaluate.gates.all(g, !has(g.minimumGain))",
    "a gate with minimumGain requires evaluate.baseline",
);
pub const ONE_MINIMUM: Rule = Rule::new(
    "[has(self.minimum), has(self.maximum), has(self.minimumGain), has(self.minimumOfTeacher)].filter(b, b).size() == 1",
    "set exactly one of minimum, maximum, minimumGain and minimumOfTeacher",
);

// hyperparameters.rs
pub const EPOCHS_OR_STEPS: Rule =
    Rule::new("!(has(self.epochs) && has(self.maxSteps))", "set epochs or maxSteps, not both");
pub const ASHA_ALONE: Rule =
    Rule::new("!has(self.asha) || self.algorithm == 'ASHA'", "asha requires the algorithm ASHA");
pub const RANGE_VALUES_OR_CHOICES: Rule = Rule::new(
    "[has(self.range), has(self.values), has(self.choices)].filter(given, given).size() == 1",
    "set exactly one of range, values and choices",
);
pub const CHOICES_ARE_NAMES: Rule = Rule::new(
    "has(self.choices) == (self.name in ['optimizer', 'schedule', 'precision'])",
    "choices is for optimizer, schedule and precision; range and values are for numbers",
);
pub const MIN_BELOW_MAX: Rule = Rule::new("self.min < self.max", "min must be below max");
pub const LOG_ABOVE_ZERO: Rule =
    Rule::new("self.scale != 'Log' || self.min > 0.0", "the Log scale requires min above 0");
pub const STEP_IS_LINEAR: Rule = Rule::new("self.scale != 'Log' || !has(self.step)", "step requires the Linear scale");
pub const STEP_ABOVE_ZERO: Rule = Rule::new("!has(self.step) || self.step > 0.0", "step must be above 0");
pub const STEPS_OR_EPOCHS: Rule =
    Rule::new("!(has(self.minimumSteps) && has(self.minimumEpochs))", "set minimumSteps or minimumEpochs, not both");

// model.rs
pub const KEEP_LAYERS_OR_FRESH: Rule =
    Rule::new("has(self.keepLayers) != has(self.fresh)", "set exactly one of keepLayers and fresh");
pub const HEADS_DIVIDE_SIZE: Rule =
    Rule::new("self.hiddenSize % self.attentionHeads == 0", "hiddenSize must be a multiple of attentionHeads");
