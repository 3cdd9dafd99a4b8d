//! The tokenizer service, as the gateway uses it: several instances, any of which answers for a model if it has the
//! same fingerprint.
//!
//! A request takes a model's [`Facts`] once and stays with their fingerprint: its prompt is encoded by an instance that
//! agrees with them, and its tokens become text by the vocabulary in them ([`Detokenizer`]), without a call. The facts in
//! use stay until no instance that answers has them, so that a rolling upgrade changes them once. Instances take turns; one that does not answer is left out until a probe finds it well,
//! unless none answers. Calls go on to the next instance, as they may be repeated.

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use lockstep_proto::{
    client::with_deadline,
    error::Error,
    tokenizer::v1::{
        DecodeRequest, EncodeInput, EncodeRequest, GetTokenizerRequest, GetVocabularyRequest, TokenIds,
        tokenizer_service_client::TokenizerServiceClient,
    },
    trace::Trace,
};
use tokio::{
    sync::{Notify, Semaphore, watch},
    time::timeout,
};
use tonic::{Code, Request, Status, transport::Channel};

pub mod detokenizer;
pub mod facts;
pub mod probe;
pub mod vocabulary;

pub use detokenizer::Detokenizer;
pub use facts::{Facts, NoTemplate};
pub use vocabulary::{UnknownToken, Vocabulary};

use crate::status;

type Client = TokenizerServiceClient<Channel>;

/// Largest answer that is read, whatever is read from clients: a text that they may send can have many more bytes as ids.
/// `Decode` answers with 32 MiB at most, and with their text, which has three bytes for each that is no UTF-8. `Encode`
/// answers to 4 MiB with one id of three bytes for each of them at most, unless a normalizer makes more of the text.
/// `GetVocabulary` has 64 MiB at most, and four bytes for each of its ids.
/// Unit: bytes.
const MAX_ANSWER_BYTES: usize = 4 * (32 << 20) + (1 << 20);

/// The instances that are configured.
#[derive(Debug)]
pub struct Tokenizers {
    instances: Vec<Instance>,
    turn: AtomicUsize,
    timeout: Duration,
    /// By model. Locked for a look-up or an update at a time, never across an await.
    facts: Mutex<HashMap<String, Arc<Facts>>>,
    changed: watch::Sender<()>,
    /// Room for one answer of `GetVocabulary`, which may be large; who waited for another's mostly needs none then.
    learning: Semaphore,
}

#[derive(Debug)]
struct Instance {
    address: String,
    client: Client,
    /// Locked for a look-up or an update at a time, never across an await.
    state: Mutex<InstanceState>,
    /// Wakes the probe of an instance that failed a call.
    failed: Notify,
}

#[derive(Debug, Default)]
struct InstanceState {
    answers: bool,
    /// By model that it was asked for; `None` where it has none of that name.
    fingerprints: HashMap<String, Option<String>>,
}

/// On whose behalf a call is made, and when its answer is of no more use.
#[derive(Debug, Clone, Copy)]
pub struct Caller<'a> {
    /// The client call.
    pub trace: &'a Trace,
    /// The end of the wait.
    pub until: Instant,
}

/// Why the tokenizer service did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// No instance answers.
    #[error("no tokenizer answers: {0}")]
    Unreachable(String),
    /// An instance answered with an error.
    #[error("tokenizer {address}: {error}")]
    Refused {
        /// The instance.
        address: String,
        /// What it said.
        error: Box<Error>,
    },
    /// The caller's time is up.
    #[error("the deadline passed before the tokenizer answered")]
    Deadline,
    /// An instance broke its contract.
    #[error("tokenizer {address}: {breach}")]
    Breach {
        /// The instance.
        address: String,
        /// How.
        breach: &'static str,
    },
}

// === impl Tokenizers ===

impl Tokenizers {
    /// Instances by address and channel, of which nothing is known yet. A call to one takes at most `timeout`.
    pub fn new(instances: Vec<(String, Channel)>, timeout: Duration) -> Self {
        let instances = instances.into_iter().map(|(address, channel)| Instance {
            address,
            client: Client::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES),
            state: Mutex::default(),
            failed: Notify::new(),
        });
        Self {
            instances: instances.collect(),
            turn: AtomicUsize::new(0),
            timeout,
            facts: Mutex::default(),
            changed: watch::Sender::new(()),
            learning: Semaphore::new(1),
        }
    }

    /// What is known of a model, from memory or from the first instance that answers.
    ///
    /// # Errors
    /// When no instance answers, or the one that does has no such model.
    pub async fn facts(&self, model: &str, caller: Caller<'_>) -> Result<Arc<Facts>, TokenizerError> {
        if let Some(facts) = self.known_facts(model) {
            return Ok(facts);
        }
        let candidates = self.in_turn(|_| true);
        let call = |instance, limit| self.describe(instance, model, caller, limit);
        let (instance, ()) = self.first_answer(candidates, caller, call).await?;
        self.known_facts(model).ok_or_else(|| instance.breach("it described a model and then did not"))
    }

    fn known_facts(&self, model: &str) -> Option<Arc<Facts>> {
        lock(&self.facts).get(model).cloned()
    }

    /// Whether some instance answers for a model.
    pub fn ready(&self, model: &str) -> bool {
        self.known_facts(model).is_some_and(|facts| self.instances.iter().any(|instance| instance.answers(&facts)))
    }

    /// Resolves whenever an instance begins or ceases to answer, or a model's facts are new.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The ids of one text.
    ///
    /// # Errors
    /// When no instance with these facts answers, or the text is refused.
    pub async fn encode(
        &self,
        facts: &Facts,
        input: EncodeInput,
        caller: Caller<'_>,
    ) -> Result<Vec<u32>, TokenizerError> {
        let request = EncodeRequest { model: facts.model().to_owned(), inputs: vec![input] };
        let candidates = self.in_turn(|instance| instance.has(facts));
        let call = |instance: &Instance, limit| {
            let (mut client, request) = (instance.client.clone(), caller.request(request.clone(), limit));
            async move { Ok(client.encode(request).await?.into_inner().outputs) }
        };
        let (instance, mut outputs) = self.first_answer(candidates, caller, call).await?;
        let ids = outputs.pop().filter(|_| outputs.is_empty()).map(|output| output.ids);
        ids.ok_or_else(|| instance.breach("one text was encoded to none or several"))
    }

    /// The text of a list of ids.
    ///
    /// # Errors
    /// When no instance with these facts answers, or the ids are refused.
    pub async fn decode(
        &self,
        facts: &Facts,
        ids: &[u32],
        skip_special_tokens: bool,
        caller: Caller<'_>,
    ) -> Result<String, TokenizerError> {
        let inputs = vec![TokenIds { ids: ids.to_vec() }];
        let request = DecodeRequest { model: facts.model().to_owned(), inputs, skip_special_tokens };
        let candidates = self.in_turn(|instance| instance.has(facts));
        let call = |instance: &Instance, limit| {
            let (mut client, request) = (instance.client.clone(), caller.request(request.clone(), limit));
            async move { Ok(client.decode(request).await?.into_inner().outputs) }
        };
        let (instance, mut outputs) = self.first_answer(candidates, caller, call).await?;
        let text = outputs.pop().filter(|_| outputs.is_empty()).map(|output| output.text);
        text.ok_or_else(|| instance.breach("one list of ids was decoded to none or several texts"))
    }

    /// What an instance says of a model; learned if it is news.
    async fn describe(
        &self,
        instance: &Instance,
        model: &str,
        caller: Caller<'_>,
        limit: Duration,
    ) -> Result<(), Status> {
        let described = async {
            let mut client = instance.client.clone();
            let request = caller.request(GetTokenizerRequest { model: model.to_owned() }, limit);
            let description = client.get_tokenizer(request).await?.into_inner();
            lock(&instance.state).learn(model, description.fingerprint.clone());
            if self.stays(&lock(&self.facts), model, &description.fingerprint) {
                return Ok(());
            }
            // It is never closed.
            let _room = self.learning.acquire().await;
            if self.stays(&lock(&self.facts), model, &description.fingerprint) {
                return Ok(());
            }
            let request = caller.request(GetVocabularyRequest { model: model.to_owned() }, limit);
            let vocabulary = client.get_vocabulary(request).await;
            let vocabulary = vocabulary.map_err(|status| status::no_vocabulary(status.message()))?.into_inner();
            if vocabulary.fingerprint != description.fingerprint {
                return Err(status::no_vocabulary("its model has just changed"));
            }
            let vocabulary = Vocabulary::new(vocabulary, description.vocab_size);
            let vocabulary = vocabulary.map_err(|error| status::no_vocabulary(&error.to_string()))?;
            self.learn(Facts::new(model, description, vocabulary));
            Ok(())
        };
        timeout(limit, described).await.unwrap_or_else(|_| Err(status::too_late()))
    }

    fn learn(&self, facts: Facts) {
        let mut known = lock(&self.facts);
        let (model, fingerprint) = (facts.model().to_owned(), facts.fingerprint());
        if !self.stays(&known, &model, fingerprint) {
            tracing::info!(model, fingerprint, "a tokenizer's facts are new");
            known.insert(model, Arc::new(facts));
            self.changed.send_replace(());
        }
    }

    /// Whether a model's facts stay as they are when an instance has those of this fingerprint.
    fn stays(&self, known: &HashMap<String, Arc<Facts>>, model: &str, fingerprint: &str) -> bool {
        known.get(model).is_some_and(|in_use| {
            in_use.fingerprint() == fingerprint || self.instances.iter().any(|instance| instance.answers(in_use))
        })
    }

    /// Takes note of whether an instance answers.
    fn heard(&self, instance: &Instance, answers: bool) {
        if std::mem::replace(&mut lock(&instance.state).answers, answers) != answers {
            self.changed.send_replace(());
        }
    }

    /// Calls one instance after another until one answers.
    async fn first_answer<'a, T, Answer>(
        &self,
        candidates: Vec<&'a Instance>,
        caller: Caller<'_>,
        call: impl Fn(&'a Instance, Duration) -> Answer,
    ) -> Result<(&'a Instance, T), TokenizerError>
    where
        Answer: Future<Output = Result<T, Status>>,
    {
        let mut failures = Vec::new();
        for instance in candidates {
            let left = caller.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TokenizerError::Deadline);
            }
            match call(instance, self.timeout.min(left)).await {
                Ok(answer) => {
                    self.heard(instance, true);
                    return Ok((instance, answer));
                }
                // That the caller had little time says nothing about the instance.
                Err(status) if does_not_answer(&status) && left < self.timeout && caller.expired() => {
                    return Err(TokenizerError::Deadline);
                }
                Err(status) if does_not_answer(&status) => {
                    self.heard(instance, false);
                    instance.failed.notify_one();
                    failures.push(format!("{} ({})", instance.address, status.message()));
                }
                Err(status) => return Err(instance.refused(&status)),
            }
        }
        if failures.is_empty() {
            failures.push("none has the model as it is in use".to_owned());
        }
        Err(TokenizerError::Unreachable(failures.join(", ")))
    }

    /// The instances that fit, each first in its turn, those that do not answer last.
    fn in_turn(&self, fits: impl Fn(&Instance) -> bool) -> Vec<&Instance> {
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % self.instances.len().max(1);
        let (before, after) = self.instances.split_at(first);
        let mut fitting: Vec<_> = after.iter().chain(before).filter(|instance| fits(instance)).collect();
        fitting.sort_by_key(|instance| !lock(&instance.state).answers);
        fitting
    }
}

// === impl Caller ===

impl Caller<'_> {
    pub(crate) fn request<T>(&self, message: T, limit: Duration) -> Request<T> {
        let mut request = with_deadline(message, limit);
        self.trace.inject(request.metadata_mut());
        request
    }

    fn expired(&self) -> bool {
        Instant::now() >= self.until
    }
}

// === impl Instance ===

impl Instance {
    fn has(&self, facts: &Facts) -> bool {
        lock(&self.state).has(facts)
    }

    fn answers(&self, facts: &Facts) -> bool {
        let state = lock(&self.state);
        state.answers && state.has(facts)
    }

    fn refused(&self, status: &Status) -> TokenizerError {
        TokenizerError::Refused { address: self.address.clone(), error: Box::new(Error::from_status(status)) }
    }

    fn breach(&self, breach: &'static str) -> TokenizerError {
        TokenizerError::Breach { address: self.address.clone(), breach }
    }
}

// === impl InstanceState ===

impl InstanceState {
    fn learn(&mut self, model: &str, fingerprint: String) {
        self.fingerprints.insert(model.to_owned(), Some(fingerprint));
    }

    fn forget(&mut self, model: &str) {
        self.fingerprints.insert(model.to_owned(), None);
    }

    fn was_asked(&self, model: &str) -> bool {
        self.fingerprints.contains_key(model)
    }

    fn has(&self, facts: &Facts) -> bool {
        self.fingerprints.get(facts.model()).is_some_and(|known| known.as_deref() == Some(facts.fingerprint()))
    }
}

/// Whether another instance may do better.
pub(crate) fn does_not_answer(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the mutexes of this module hold is whole between statements, so that a panic elsewhere leaves it so.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
