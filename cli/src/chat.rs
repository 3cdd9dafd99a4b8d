//! `lockstep chat`: a conversation in the terminal, or over a pipe with one turn on each line.
//!
//! On a terminal Ctrl-C stops the answer, which stays in the conversation as far as it came, and not the program;
//! Ctrl-D or /quit ends it. On a pipe only answers go to stdout, and the end of input ends the program.

mod session;

use std::{
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    process::ExitCode,
};

use clap::Args;
use lockstep_proto::v1::{SamplingParams, StreamChatRequest};
use rustyline::{DefaultEditor, error::ReadlineError};
use tokio::runtime::Runtime;

use self::session::{Command, Session};
use crate::{
    events::Answer,
    failure::{Done, Failure},
    sampling,
    target::Target,
};

/// What `lockstep chat` takes.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Name of the model; the only one served may be left out
    #[arg(long, default_value = "")]
    model: String,
    /// Instructions for the whole conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// A sampling parameter, such as temperature=0.2; may be repeated
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = sampling::parse_pair)]
    settings: Vec<(String, String)>,
    #[command(flatten)]
    target: Target,
}

/// Where lines come from.
enum Input {
    Terminal(Box<DefaultEditor>),
    Pipe { stdin: io::StdinLock<'static>, n_lines: usize },
}

/// Holds the conversation until the input ends.
pub(crate) fn run(options: &Options, runtime: &Runtime) -> Done {
    let sampling = sampling::from_pairs(&options.settings).map_err(Failure::Usage)?;
    let mut session = Session::new(options.system.clone(), sampling);
    let mut input = Input::open()?;
    let interactive = matches!(input, Input::Terminal(_));
    while let Some(line) = input.next_line()? {
        match Command::parse(&line) {
            Command::Nothing => {}
            Command::Quit => break,
            Command::Say(text) => {
                session.ask(text);
                match runtime.block_on(answer(&mut session, options, interactive)) {
                    // A person can mend what was wrong and go on; a script must see that it failed.
                    Err(failure) if interactive => eprintln!("{failure}"),
                    result => result?,
                }
            }
            command => match session.apply(&command) {
                Ok(note) => eprintln!("{note}"),
                Err(error) if interactive => eprintln!("{error}"),
                Err(error) => return Err(Failure::Usage(error)),
            },
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Streams the answer to the turn that was asked last.
async fn answer(session: &mut Session, options: &Options, interactive: bool) -> Result<(), Failure> {
    let (mut answer, mut out) = (Answer::default(), io::stdout());
    let printed = async {
        let request = options.target.request(request(session, options))?;
        let stream = options.target.inference()?.stream_chat(request).await;
        let stream = stream.map_err(|status| options.target.failure(&status))?.into_inner();
        answer.print(stream, &mut out, &options.target).await
    };
    let result = tokio::select! {
        result = printed => result,
        // On a pipe the signal ends the program, as it does any filter.
        _ = tokio::signal::ctrl_c(), if interactive => Ok(()),
    };
    if !answer.text.is_empty() {
        writeln!(out)?;
    }
    if let Some(note) = answer.note() {
        eprintln!("({note})");
    }
    session.answered(answer.text);
    result
}

fn request(session: &Session, options: &Options) -> StreamChatRequest {
    let sampling: SamplingParams = session.sampling().clone();
    StreamChatRequest {
        model: options.model.clone(),
        conversation: Some(session.conversation()),
        sampling: Some(sampling),
        output: None,
    }
}

// === impl Input ===

impl Input {
    fn open() -> Result<Self, Failure> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Pipe { stdin: io::stdin().lock(), n_lines: 0 });
        }
        let editor = DefaultEditor::new().map_err(|error| Failure::Failed(error.to_string()))?;
        eprintln!("/help lists what can be typed; Ctrl-C stops an answer, Ctrl-D ends the conversation.");
        Ok(Self::Terminal(Box::new(editor)))
    }

    /// `None` at the end of the input.
    fn next_line(&mut self) -> Result<Option<String>, Failure> {
        match self {
            Self::Pipe { stdin, n_lines } => {
                let mut line = String::new();
                *n_lines += 1;
                let count = stdin.read_line(&mut line).map_err(|error| match error.kind() {
                    io::ErrorKind::InvalidData => Failure::Usage(format!("stdin: line {n_lines} is not UTF-8")),
                    _ => error.into(),
                })?;
                Ok((count > 0).then_some(line))
            }
            Self::Terminal(editor) => loop {
                match editor.readline("> ") {
                    Ok(line) => {
                        let _ = editor.add_history_entry(&line);
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Interrupted) => {}
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(Failure::Failed(error.to_string())),
                }
            },
        }
    }
}
