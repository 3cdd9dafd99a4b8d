//! An embedding request: several raw prompts, and the form of what they become.

use lockstep_proto::{v1, worker::v1::Pooling};

use super::{ModelFacts, RequestError, ValidPrompt, Violations};

/// Prompts of one request.
const MAX_INPUTS: usize = 256;

/// An `Embed` call.
#[derive(Clone, Debug)]
pub struct ValidEmbed {
    inputs: Vec<ValidPrompt>,
    pooling: Pooling,
    normalize: bool,
    dimensions: usize,
}

// === impl ValidEmbed ===

impl ValidEmbed {
    /// Checks prompts, and how they are to be embedded by a model whose embeddings have `embedding_size` values.
    ///
    /// # Errors
    ///
    /// Every violation.
    pub fn new(request: v1::EmbedRequest, facts: &ModelFacts, embedding_size: u32) -> Result<Self, RequestError> {
        let mut violations = Violations::default();
        let n_inputs = request.inputs.len();
        if !(1..=MAX_INPUTS).contains(&n_inputs) {
            violations.invalid("inputs", format!("{n_inputs} prompts are not in 1..={MAX_INPUTS}"));
        }
        let read = |(index, input): (usize, v1::RawPrompt)| {
            ValidPrompt::read_at(&format!("inputs[{index}]"), Some(input), facts, &mut violations)
        };
        let inputs = request.inputs.into_iter().take(MAX_INPUTS).enumerate().map(read).collect();
        let pooling = match v1::Pooling::try_from(request.pooling) {
            Ok(v1::Pooling::Last) => Pooling::Last,
            Ok(v1::Pooling::Mean | v1::Pooling::Unspecified) => Pooling::Mean,
            Err(_) => {
                violations.invalid("pooling", format!("{} is no way to pool", request.pooling));
                Pooling::Unspecified
            }
        };
        let dimensions = request.dimensions.unwrap_or(embedding_size);
        if request.dimensions.is_some_and(|dimensions| !(1..=embedding_size).contains(&dimensions)) {
            violations.invalid("dimensions", format!("{dimensions} is not in 1..={embedding_size}"));
        }
        violations.into_result()?;
        Ok(Self { inputs, pooling, normalize: request.normalize.unwrap_or(true), dimensions: dimensions as usize })
    }

    /// What to embed, in order; at least one.
    pub fn inputs(&self) -> &[ValidPrompt] {
        &self.inputs
    }

    /// How hidden states become one.
    pub fn pooling(&self) -> Pooling {
        self.pooling
    }

    /// Whether the norm of an embedding is 1.
    pub fn normalize(&self) -> bool {
        self.normalize
    }

    /// Values of an embedding that are kept.
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }
}

#[cfg(test)]
mod tests {
    use lockstep_proto::{
        tokenizer::v1::GetTokenizerResponse,
        v1::{EmbedRequest, RawPrompt, TokenIds, raw_prompt::Prompt},
    };

    use super::*;

    fn facts() -> ModelFacts {
        let tokenizer = GetTokenizerResponse { vocab_size: 100, ..GetTokenizerResponse::default() };
        ModelFacts::new(&tokenizer, 4).unwrap()
    }

    fn ids(ids: &[u32]) -> RawPrompt {
        RawPrompt { prompt: Some(Prompt::TokenIds(TokenIds { ids: ids.to_vec() })) }
    }

    fn request() -> EmbedRequest {
        EmbedRequest { inputs: vec![ids(&[1]), ids(&[1, 2, 3, 99])], ..EmbedRequest::default() }
    }

    /// The paths of what is wrong with a request that was changed.
    fn check(expected: &[&str], change: impl FnOnce(&mut EmbedRequest)) {
        let mut request = request();
        change(&mut request);
        let error = ValidEmbed::new(request, &facts(), 8).unwrap_err();
        let paths: Vec<_> = error.violations().iter().map(|violation| violation.path.as_str()).collect();
        assert_eq!(paths, expected, "{error}");
    }

    #[test]
    fn a_plain_request_is_valid_and_takes_the_contract_s_defaults() {
        let valid = ValidEmbed::new(request(), &facts(), 8).unwrap();
        assert_eq!(
            (valid.inputs().len(), valid.pooling(), valid.normalize(), valid.dimensions()),
            (2, Pooling::Mean, true, 8)
        );
        let chosen = EmbedRequest { pooling: 2, normalize: Some(false), dimensions: Some(1), ..request() };
        let valid = ValidEmbed::new(chosen, &facts(), 8).unwrap();
        assert_eq!((valid.pooling(), valid.normalize(), valid.dimensions()), (Pooling::Last, false, 1));
    }

    #[test]
    fn every_field_that_breaks_a_rule_is_named() {
        check(&["inputs"], |request| request.inputs.clear());
        check(&["inputs"], |request| request.inputs = vec![ids(&[1]); 257]);
        check(&["inputs[1]"], |request| request.inputs[1].prompt = None);
        check(&["inputs[0].token_ids.ids"], |request| request.inputs[0] = ids(&[]));
        check(&["inputs[0].token_ids.ids"], |request| request.inputs[0] = ids(&[1; 5]));
        check(&["inputs[1].token_ids.ids[2]"], |request| request.inputs[1] = ids(&[1, 2, 100]));
        check(&["inputs[0].text"], |request| {
            request.inputs[0].prompt = Some(Prompt::Text("a".repeat((4 << 20) + 1)));
        });
        check(&["pooling"], |request| request.pooling = 3);
        check(&["dimensions"], |request| request.dimensions = Some(0));
        check(&["dimensions"], |request| request.dimensions = Some(9));
        check(&["inputs[1]", "pooling", "dimensions"], |request| {
            (request.pooling, request.dimensions, request.inputs[1].prompt) = (-1, Some(0), None);
        });
    }
}
