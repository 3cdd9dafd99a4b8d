//! The pipeline: what happens to every request, whatever front it came by. A front translates its own protocol to the
//! requests of `lockstep.v1` and their answers back; letting in, checking, templates, sampling and streaming are here
//! and nowhere else.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use http::HeaderMap;
use lockstep_proto::{server::Readiness, trace::Trace, v1};

use crate::{
    admission::{Admission, Permit},
    backends::Backends,
    embedding,
    generation::{
        self, Deadline, Events, Job, Prompt, Source,
        collect::{Answer, collect},
    },
    metrics::{Meter, Metrics},
    models::Models,
    request::{
        ModelFacts, Rules, ValidChat, ValidConversation, ValidCount, ValidEmbed, ValidGenerate, ValidOutput,
        ValidPrompt,
    },
    router::ServedModel,
    sampling::{Policy, ValidSampling},
    status::Failure,
    tokenizer::{Caller, Facts, NoTemplate},
    tools::reader,
};

/// What all fronts share.
#[derive(Debug)]
pub struct Pipeline {
    /// Who gets in.
    pub admission: Admission,
    /// What is served.
    pub models: Models,
    /// Who does the work.
    pub backends: Arc<Backends>,
    /// What the operator allows.
    pub policy: Policy,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Whether work can be taken.
    pub readiness: Readiness,
    /// Longest life of a request.
    pub max_duration: Duration,
}

/// A call at the gate, as its front read it from the head of its protocol's request.
#[derive(Debug)]
pub struct Arrival<'a> {
    /// What is called, as metrics name it.
    pub method: &'static str,
    /// Names the call.
    pub trace: Trace,
    /// Where the caller shows a key.
    pub headers: &'a HeaderMap,
    /// The message's size. Unit: bytes.
    pub n_bytes: usize,
    /// What the caller gives it; none: no limit of the caller's.
    pub timeout: Option<Duration>,
}

/// A call that was let in.
#[derive(Debug)]
pub struct Call {
    trace: Trace,
    deadline: Deadline,
    meter: Meter,
    permit: Permit,
}

/// An answer that is being generated.
#[derive(Debug)]
pub struct Answering {
    events: Events,
    facts: Arc<Facts>,
    n: u32,
}

/// The tokens of a prompt.
#[derive(Debug)]
pub struct Tokenized {
    /// Their ids.
    pub ids: Vec<u32>,
    /// The text of each by itself, if it was asked for.
    pub texts: Option<Vec<String>>,
    /// Tokens that the model's context holds.
    pub context_length: u32,
}

/// What a call is checked against.
struct Model {
    facts: Arc<Facts>,
    rules: ModelFacts,
    embedding_size: u32,
}

/// A valid request.
struct Work {
    facts: Arc<Facts>,
    source: Source,
    tools: Option<reader::Rules>,
    sampling: ValidSampling,
    output: ValidOutput,
}

// === impl Pipeline ===

impl Pipeline {
    /// Lets a call in, with the time that its client gives it.
    ///
    /// # Errors
    /// When the caller shows no key that is known, or there is no place.
    pub fn enter(&self, arrival: Arrival<'_>) -> Result<Call, Failure> {
        let arrived = Instant::now();
        let mut meter = self.metrics.meter(arrival.method, arrived);
        let admitted =
            self.admission.authenticate(arrival.headers).and_then(|()| self.admission.admit(arrival.n_bytes));
        let permit = meter.note(admitted.map_err(Failure::from))?;
        let timeout = arrival.timeout.map_or(self.max_duration, |given| given.min(self.max_duration));
        Ok(Call { trace: arrival.trace, deadline: Deadline::new(arrived, timeout), meter, permit })
    }

    /// Answers a conversation.
    ///
    /// # Errors
    /// Whatever can be known to be wrong before the work begins.
    pub async fn chat(&self, mut call: Call, request: v1::ChatRequest) -> Result<Answering, Failure> {
        let checked = self.check_chat(request, &call).await;
        let work = call.meter.note(checked)?;
        Ok(self.begin(call, work))
    }

    /// Continues a raw prompt.
    ///
    /// # Errors
    /// Whatever can be known to be wrong before the work begins.
    pub async fn generate(&self, mut call: Call, request: v1::GenerateRequest) -> Result<Answering, Failure> {
        let checked = self.check_generate(request, &call).await;
        let work = call.meter.note(checked)?;
        Ok(self.begin(call, work))
    }

    /// Embeds raw prompts.
    ///
    /// # Errors
    /// When it is wrong, or one of the prompts cannot be encoded or computed.
    pub async fn embed(&self, mut call: Call, request: v1::EmbedRequest) -> Result<v1::EmbedResponse, Failure> {
        let embedded = self.embedded(request, &call).await;
        if let Ok(response) = &embedded {
            call.meter.tokens(response.prompt_tokens, 0);
        }
        call.meter.settle(embedded)
    }

    /// Counts the tokens of a prompt.
    ///
    /// # Errors
    /// When it is wrong, or cannot be rendered or encoded.
    pub async fn count(
        &self,
        mut call: Call,
        request: v1::CountTokensRequest,
    ) -> Result<v1::CountTokensResponse, Failure> {
        let prompt = self.prompt(request, &call).await;
        let prompt = call.meter.settle(prompt)?;
        Ok(v1::CountTokensResponse { token_count: prompt.n_tokens() })
    }

    /// Shows the tokens of a prompt, with the text of each if that is asked for.
    ///
    /// # Errors
    /// When it is wrong, or cannot be rendered or encoded.
    pub async fn tokenize(
        &self,
        mut call: Call,
        request: v1::CountTokensRequest,
        with_texts: bool,
    ) -> Result<Tokenized, Failure> {
        let tokenized = self.tokenized(request, with_texts, &call).await;
        call.meter.settle(tokenized)
    }

    /// The text of tokens, control tokens included.
    ///
    /// # Errors
    /// When an id is none of the model's, or no tokenizer answers.
    pub async fn detokenize(&self, mut call: Call, model: &str, ids: Vec<u32>) -> Result<String, Failure> {
        let text = self.text(model, ids, &call).await;
        call.meter.settle(text)
    }

    /// Shows the prompt that a conversation becomes.
    ///
    /// # Errors
    /// When it is wrong, or cannot be rendered or encoded.
    pub async fn render(
        &self,
        mut call: Call,
        request: v1::RenderChatRequest,
    ) -> Result<v1::RenderChatResponse, Failure> {
        let rendered = self.rendered(request, &call).await;
        let Prompt { ids, text } = call.meter.settle(rendered)?;
        Ok(v1::RenderChatResponse { prompt: text.unwrap_or_default(), token_ids: ids })
    }

    /// Describes the models that are served, by name, to a caller whom the gate knows.
    ///
    /// # Errors
    /// When the caller shows no key that is known, or no tokenizer can describe a model.
    pub async fn list_models(&self, headers: &HeaderMap, trace: &Trace) -> Result<Vec<v1::Model>, Failure> {
        self.admission.authenticate(headers)?;
        self.describe(self.models.list(), trace).await
    }

    /// Describes one model, to a caller whom the gate knows.
    ///
    /// # Errors
    /// When the caller shows no key that is known, or there is no such model.
    pub async fn model(&self, name: &str, headers: &HeaderMap, trace: &Trace) -> Result<v1::Model, Failure> {
        self.admission.authenticate(headers)?;
        let described = self.describe([self.models.resolve(name)?].into(), trace).await?;
        described.into_iter().next().ok_or_else(|| Failure::UnknownModel(name.to_owned()))
    }

    async fn describe(&self, served: BTreeMap<String, ServedModel>, trace: &Trace) -> Result<Vec<v1::Model>, Failure> {
        let mut models = Vec::new();
        for (name, served) in served {
            let policy = self.policy.for_model(&name);
            models.push(self.models.describe(name, served, policy, trace).await?);
        }
        Ok(models)
    }

    /// What is known of the model that a request names.
    async fn facts(&self, name: &str, call: &Call) -> Result<Model, Failure> {
        let (name, served) = self.models.resolve(name)?;
        let facts = self.backends.tokenizers.facts(&name, call.caller()).await?;
        let rules = ModelFacts::new(facts.description(), served.context_length)
            .map_err(|error| Failure::Facts { model: name, error })?;
        Ok(Model { facts, rules, embedding_size: served.embedding_size })
    }

    async fn check_chat(&self, request: v1::ChatRequest, call: &Call) -> Result<Work, Failure> {
        let model = self.facts(&request.model, call).await?;
        model.can_chat()?;
        let valid = ValidChat::new(request, self.rules(&model))?;
        Ok(Work {
            source: Source::Conversation(valid.conversation().clone()),
            tools: valid.tools().cloned(),
            sampling: valid.sampling().clone(),
            output: valid.output().clone(),
            facts: model.facts,
        })
    }

    async fn check_generate(&self, request: v1::GenerateRequest, call: &Call) -> Result<Work, Failure> {
        let model = self.facts(&request.model, call).await?;
        let valid = ValidGenerate::new(request, self.rules(&model))?;
        Ok(Work {
            source: Source::Raw(valid.prompt().clone()),
            tools: None,
            sampling: valid.sampling().clone(),
            output: valid.output().clone(),
            facts: model.facts,
        })
    }

    fn rules<'a>(&'a self, model: &'a Model) -> Rules<'a> {
        Rules { facts: &model.rules, policy: self.policy.for_model(model.facts.model()) }
    }

    fn begin(&self, call: Call, work: Work) -> Answering {
        let Call { trace, deadline, meter, permit } = call;
        let Work { facts, source, tools, sampling, output } = work;
        let n = sampling.n();
        let facts_of_job = Arc::clone(&facts);
        let job = Job { trace, deadline, meter, permit, facts: facts_of_job, source, tools, sampling, output };
        Answering { events: generation::start(Arc::clone(&self.backends), job), facts, n }
    }

    async fn embedded(&self, request: v1::EmbedRequest, call: &Call) -> Result<v1::EmbedResponse, Failure> {
        let model = self.facts(&request.model, call).await?;
        let job = embedding::Job {
            backends: &self.backends,
            trace: &call.trace,
            deadline: call.deadline,
            facts: &model.facts,
            context_length: model.rules.context_length(),
            embedding_size: model.embedding_size,
            request: &ValidEmbed::new(request, &model.rules, model.embedding_size)?,
        };
        job.run().await
    }

    async fn prompt(&self, request: v1::CountTokensRequest, call: &Call) -> Result<Prompt, Failure> {
        let model = self.facts(&request.model, call).await?;
        if let Some(v1::count_tokens_request::Input::Conversation(_)) = &request.input {
            model.can_chat()?;
        }
        let source = match ValidCount::new(request, &model.rules)? {
            ValidCount::Conversation(conversation) => Source::Conversation(conversation),
            ValidCount::Prompt(prompt) => Source::Raw(prompt),
        };
        source.prompt(&self.backends.tokenizers, &model.facts, call.caller()).await
    }

    async fn tokenized(
        &self,
        request: v1::CountTokensRequest,
        with_texts: bool,
        call: &Call,
    ) -> Result<Tokenized, Failure> {
        let model = self.facts(&request.model, call).await?;
        let ids = self.prompt(request, call).await?.ids;
        let texts = if with_texts { Some(token_texts(&model.facts, &ids)?) } else { None };
        Ok(Tokenized { ids, texts, context_length: model.rules.context_length() })
    }

    async fn text(&self, model: &str, ids: Vec<u32>, call: &Call) -> Result<String, Failure> {
        let model = self.facts(model, call).await?;
        let prompt = v1::RawPrompt { prompt: Some(v1::raw_prompt::Prompt::TokenIds(v1::TokenIds { ids })) };
        match ValidPrompt::new(Some(prompt), &model.rules)? {
            ValidPrompt::Text(text) => Ok(text),
            ValidPrompt::TokenIds(ids) => {
                Ok(self.backends.tokenizers.decode(&model.facts, &ids, false, call.caller()).await?)
            }
        }
    }

    async fn rendered(&self, request: v1::RenderChatRequest, call: &Call) -> Result<Prompt, Failure> {
        let model = self.facts(&request.model, call).await?;
        model.can_chat()?;
        let source = Source::Conversation(ValidConversation::new(request, &model.rules)?);
        source.prompt(&self.backends.tokenizers, &model.facts, call.caller()).await
    }
}

// === impl Call ===

impl Call {
    /// Takes note of what is wrong with the call, if something is.
    ///
    /// # Errors
    /// The failure itself.
    pub fn note<T, E: Into<Failure>>(&mut self, step: Result<T, E>) -> Result<T, Failure> {
        self.meter.note(step.map_err(Into::into))
    }

    fn caller(&self) -> Caller<'_> {
        Caller { trace: &self.trace, until: self.deadline.tokens() }
    }
}

// === impl Answering ===

impl Answering {
    /// What is known of the model that answers.
    pub fn facts(&self) -> &Arc<Facts> {
        &self.facts
    }

    /// The answer as it is generated, once its first event is there.
    ///
    /// # Errors
    /// When it fails before that: then it is a plain error, and no broken stream.
    pub async fn events(self) -> Result<Events, Failure> {
        self.events.begun().await
    }

    /// The answer as it is generated, be it that nothing comes but a failure.
    pub fn into_events(self) -> Events {
        self.events
    }

    /// The whole answer.
    ///
    /// # Errors
    /// When it is cut.
    pub async fn collect(self) -> Result<Answer, Failure> {
        collect(self.events, self.n).await
    }
}

// === impl Model ===

impl Model {
    fn can_chat(&self) -> Result<(), Failure> {
        let no_template =
            |why: &NoTemplate| Failure::NoTemplate { model: self.facts.model().to_owned(), why: why.clone() };
        self.facts.template().map(|_| ()).map_err(no_template)
    }
}

fn token_texts(facts: &Facts, ids: &[u32]) -> Result<Vec<String>, Failure> {
    let text = |&id| Ok(String::from_utf8_lossy(facts.vocabulary().bytes(id)?).into_owned());
    ids.iter().map(text).collect()
}
