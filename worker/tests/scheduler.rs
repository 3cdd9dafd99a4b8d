//! Plays the scheduler's transcripts: `tests/scheduler/*.txt`, one story each.
//!
//! A transcript begins with its story, each line after a `#`. Then come commands, each followed by `----`, by what it
//! answers, and by an empty line:
//!
//! | command | what it does |
//! |---|---|
//! | `config key=value...` | a new scheduler; keys: step, chunk, prompt_logits, running, waiting, blocks, block, context; also `ngram` |
//! | `add NAME prompt=1-4,9 new=N` | adds a sequence; also `deadline=T`, `logprobs` and `after=NAME`; `embed=mean`, `embed=last` |
//! | `abort NAME` | aborts it |
//! | `schedule` | plans a step; `at=T` moves the clock |
//! | `commit NAME=TOKENS...` | commits it; `TOKENS!` ends the sequence |
//! | `steps TOKEN` | schedules and commits until nothing is left, sampling this token each time |
//! | `reset` | forgets everything |
//! | `stats` | shows the load |
//!
//! `LOCKSTEP_UPDATE_TRANSCRIPTS=1` writes the answers anew; read the difference before you commit it.

#![allow(clippy::unwrap_used, reason = "a transcript that cannot be played fails the test, helpers included")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use lockstep_worker::scheduler::plan::{RowResults, SeqId, SequenceStep, StepPlan};
use lockstep_worker::scheduler::speculation::Speculation;
use lockstep_worker::scheduler::{Ended, NewSequence, Pooling, Sampled, Scheduler, SchedulerConfig};

#[test]
fn transcripts_come_true() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scheduler");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 8, "{paths:?}");
    for path in paths {
        let transcript = std::fs::read_to_string(&path).unwrap();
        let replayed = replay(&transcript);
        if std::env::var_os("LOCKSTEP_UPDATE_TRANSCRIPTS").is_some() {
            std::fs::write(&path, &replayed).unwrap();
            continue;
        }
        assert!(replayed == transcript, "{} turned out otherwise:\n{replayed}", path.display());
    }
}

/// The transcript with the answers that the scheduler gives now.
fn replay(transcript: &str) -> String {
    let mut player: Option<Player> = None;
    let mut replayed = String::new();
    let mut lines = transcript.lines();
    while let Some(line) = lines.next() {
        writeln!(replayed, "{line}").unwrap();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        assert_eq!(lines.next(), Some("----"), "after {line:?}");
        lines.by_ref().take_while(|answer| !answer.is_empty()).for_each(drop);
        let answer = if let Some(config) = line.strip_prefix("config ") {
            player = Some(Player::new(config));
            String::new()
        } else {
            player.as_mut().expect("config comes first").play(line)
        };
        writeln!(replayed, "----\n{answer}").unwrap();
    }
    replayed.truncate(replayed.trim_end().len());
    replayed + "\n"
}

struct Player {
    scheduler: Scheduler,
    names: BTreeMap<SeqId, String>,
    start: Instant,
    now: Instant,
}

impl Player {
    fn new(config: &str) -> Self {
        let options = Options::new(config);
        let config = SchedulerConfig {
            max_step_tokens: options.number("step", 16),
            max_prefill_chunk: options.number("chunk", 16),
            max_prompt_logits_rows: options.number("prompt_logits", 16),
            max_running: options.number("running", 4),
            max_waiting: options.number("waiting", 8),
            n_blocks: options.number("blocks", 16) as u32,
            block_size: options.number("block", 4) as u32,
            context_length: options.number("context", 64) as u32,
            speculation: if options.get("ngram").is_some() { Speculation::Ngram } else { Speculation::Off },
        };
        let now = Instant::now();
        Self { scheduler: Scheduler::new(config).unwrap(), names: BTreeMap::new(), start: now, now }
    }

    fn play(&mut self, line: &str) -> String {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        let answer = match command {
            "add" => self.add(rest),
            "abort" => {
                self.scheduler.abort(self.id(rest));
                String::new()
            }
            "schedule" => self.schedule(&Options::new(rest)),
            "commit" => self.commit(rest),
            "steps" => self.steps(rest.parse().unwrap()),
            "reset" => {
                let ended = self.scheduler.reset();
                format!("ended {}\n", self.list(&ended))
            }
            "stats" => self.stats(),
            _ => panic!("what is {command:?}?"),
        };
        self.scheduler.check_integrity();
        answer
    }

    fn add(&mut self, rest: &str) -> String {
        let (name, options) = rest.split_once(' ').unwrap();
        let options = Options::new(options);
        let new = NewSequence {
            prompt: options.token_ids("prompt"),
            max_new_tokens: options.number("new", 8) as u32,
            pooling: options.get("embed").map(|pooling| match pooling {
                "mean" => Pooling::Mean,
                "last" => Pooling::Last,
                other => panic!("what is embed={other}?"),
            }),
            deadline: options.get("deadline").map(|_| self.at(options.number("deadline", 0))),
            prompt_logprobs: options.get("logprobs").is_some(),
            after: options.get("after").map(|name| self.id(name)),
            no_drafts: false,
        };
        match self.scheduler.add(new, self.now) {
            Ok(id) => {
                self.names.insert(id, name.to_owned());
                String::new()
            }
            Err(refusal) => format!("refused: {refusal}\n"),
        }
    }

    fn schedule(&mut self, options: &Options<'_>) -> String {
        if options.get("at").is_some() {
            self.now = self.at(options.number("at", 0));
        }
        let scheduled = self.scheduler.schedule(self.now);
        let mut answer = String::new();
        if !scheduled.expired.is_empty() {
            writeln!(answer, "expired {}", self.list(&scheduled.expired)).unwrap();
        }
        match &scheduled.plan {
            Some(plan) => answer += &self.show_plan(plan),
            None => answer += "nothing to do\n",
        }
        answer
    }

    fn commit(&mut self, rest: &str) -> String {
        let sampled: Vec<Sampled> = rest
            .split_whitespace()
            .map(|pair| {
                let (name, tokens) = pair.split_once('=').unwrap();
                let stop = tokens.ends_with('!');
                Sampled { id: self.id(name), tokens: token_ids(tokens.trim_end_matches('!')), stop }
            })
            .collect();
        self.commit_sampled(&sampled)
    }

    fn commit_sampled(&mut self, sampled: &[Sampled]) -> String {
        let show = |(id, ended): (SeqId, Ended)| format!("{} ended: {ended:?}\n", self.names[&id]);
        self.scheduler.commit(sampled).into_iter().map(show).collect()
    }

    fn steps(&mut self, token: u32) -> String {
        let mut answer = String::new();
        loop {
            answer += &self.schedule(&Options::new(""));
            if answer.ends_with("nothing to do\n") {
                return answer;
            }
            let due: Vec<_> = self.scheduler.due().map(|id| Sampled { id, tokens: vec![token], stop: false }).collect();
            answer += &self.commit_sampled(&due);
            self.scheduler.check_integrity();
        }
    }

    fn stats(&self) -> String {
        let stats = self.scheduler.stats();
        let blocks = stats.blocks;
        format!(
            "waiting {}, running {}, {} tokens; blocks: {} free, {} cached, {} referenced\n",
            stats.waiting, stats.running, stats.outstanding_tokens, blocks.free, blocks.cached, blocks.referenced
        )
    }

    fn show_plan(&self, plan: &StepPlan) -> String {
        let mut shown = format!("step {}", plan.step_id);
        if !plan.released.is_empty() {
            write!(shown, ", released {}", self.list(&plan.released)).unwrap();
        }
        shown.push('\n');
        plan.sequences.iter().for_each(|sequence| shown += &self.show_sequence(sequence));
        shown
    }

    fn show_sequence(&self, step: &SequenceStep) -> String {
        let mut shown = format!("  {} at {}: {}", self.names[&step.id], step.start_position, join(&step.token_ids));
        if !step.new_blocks.is_empty() {
            let blocks: Vec<_> = step.new_blocks.iter().map(|block| block.0).collect();
            write!(shown, "; blocks {}", join(&blocks)).unwrap();
        }
        let drafts = self.scheduler.drafts(step.id);
        if !drafts.is_empty() {
            write!(shown, "; drafts {}", join(drafts)).unwrap();
        }
        match step.results {
            RowResults::None => {}
            RowResults::LastLogits => shown += "; last logits",
            RowResults::AllLogits => shown += "; all logits",
            RowResults::LastHidden => shown += "; last hidden",
            RowResults::AllHidden => shown += "; all hidden",
        }
        shown + "\n"
    }

    fn list(&self, ids: &[SeqId]) -> String {
        ids.iter().map(|id| self.names[id].as_str()).collect::<Vec<_>>().join(" ")
    }

    fn id(&self, name: &str) -> SeqId {
        *self.names.iter().find(|(_, other)| *other == name).unwrap_or_else(|| panic!("who is {name:?}?")).0
    }

    fn at(&self, seconds: usize) -> Instant {
        self.start + Duration::from_secs(seconds as u64)
    }
}

fn join(numbers: &[u32]) -> String {
    numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
}

/// `key=value` pairs and bare keys.
struct Options<'a>(BTreeMap<&'a str, &'a str>);

impl<'a> Options<'a> {
    fn new(text: &'a str) -> Self {
        Self(text.split_whitespace().map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect())
    }

    fn get(&self, key: &str) -> Option<&'a str> {
        self.0.get(key).copied()
    }

    fn number(&self, key: &str, default: usize) -> usize {
        self.get(key).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{key}={value}")))
    }

    fn token_ids(&self, key: &str) -> Vec<u32> {
        token_ids(self.get(key).unwrap_or(""))
    }
}

/// `1-4,9` is 1, 2, 3, 4, 9.
fn token_ids(text: &str) -> Vec<u32> {
    let ranges = text.split(',').filter(|range| !range.is_empty());
    ranges
        .flat_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            first.parse::<u32>().unwrap()..=last.parse().unwrap()
        })
        .collect()
}
