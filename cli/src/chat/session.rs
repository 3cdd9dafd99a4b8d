//! A [`Session`] is a conversation as far as it has come, with the settings for its next answer. It does no IO.

use lockstep_proto::v1::{ContentPart, Conversation, Message, Role, SamplingParams, content_part};

use crate::sampling;

const HELP: &str = "\
/reset              forget the conversation, keep instructions and settings
/system TEXT        instructions for the whole conversation; without TEXT: none
/set NAME VALUE     sampling for the next answers; VALUE `default` takes it back
/set                show what is set
/quit               end
Anything else is said to the model; //x says /x.";

/// One line of input.
#[derive(Debug, PartialEq)]
pub(super) enum Command {
    Nothing,
    Say(String),
    Reset,
    System(Option<String>),
    Set { name: String, value: String },
    Show,
    Help,
    Quit,
    Unknown(String),
}

/// A conversation as far as it has come.
#[derive(Debug)]
pub(super) struct Session {
    system: Option<String>,
    turns: Vec<Message>,
    sampling: SamplingParams,
}

// === impl Command ===

impl Command {
    pub(super) fn parse(line: &str) -> Self {
        let line = line.trim();
        let Some(command) = line.strip_prefix('/') else {
            return if line.is_empty() { Self::Nothing } else { Self::Say(line.to_owned()) };
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match (name, rest) {
            ("reset", "") => Self::Reset,
            ("system", "") => Self::System(None),
            ("system", text) => Self::System(Some(text.to_owned())),
            ("set", "") => Self::Show,
            ("set", pair) => match pair.split_once(|at: char| at == '=' || at.is_whitespace()) {
                Some((name, value)) => Self::Set { name: name.to_owned(), value: value.trim().to_owned() },
                None => Self::Unknown(line.to_owned()),
            },
            ("help", "") => Self::Help,
            ("quit" | "exit", "") => Self::Quit,
            _ if command.starts_with('/') => Self::Say(command.to_owned()),
            _ => Self::Unknown(line.to_owned()),
        }
    }
}

// === impl Session ===

impl Session {
    pub(super) fn new(system: Option<String>, sampling: SamplingParams) -> Self {
        Self { system, turns: Vec::new(), sampling }
    }

    /// Adds a turn of the user.
    pub(super) fn ask(&mut self, text: String) {
        self.turns.push(message(Role::User, text));
    }

    /// Adds the answer to it, however far it came. Without one the question is taken back, so that turns alternate.
    pub(super) fn answered(&mut self, text: String) {
        if text.is_empty() {
            self.turns.pop();
        } else {
            self.turns.push(message(Role::Assistant, text));
        }
    }

    /// Carries out a command and says what it did.
    pub(super) fn apply(&mut self, command: &Command) -> Result<String, String> {
        match command {
            Command::Reset => {
                self.turns.clear();
                Ok("the conversation starts anew".into())
            }
            Command::System(text) => {
                self.system.clone_from(text);
                Ok(if text.is_some() { "instructions are set" } else { "there are no instructions now" }.into())
            }
            Command::Set { name, value } => {
                sampling::set(&mut self.sampling, name, value)?;
                Ok(format!("{name} = {value}"))
            }
            Command::Show => Ok(sampling::show(&self.sampling)),
            Command::Help => Ok(HELP.into()),
            Command::Unknown(line) => Err(format!("`{line}` is no command; /help lists them")),
            Command::Nothing | Command::Say(_) | Command::Quit => Ok(String::new()),
        }
    }

    pub(super) fn sampling(&self) -> &SamplingParams {
        &self.sampling
    }

    /// What the model sees.
    pub(super) fn conversation(&self) -> Conversation {
        let system = self.system.clone().map(|text| message(Role::System, text));
        Conversation { messages: system.into_iter().chain(self.turns.iter().cloned()).collect(), ..Default::default() }
    }
}

fn message(role: Role, text: String) -> Message {
    let part = ContentPart { part: Some(content_part::Part::Text(text)) };
    Message { role: role.into(), content: vec![part], ..Message::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roles(session: &Session) -> Vec<Role> {
        session.conversation().messages.iter().map(Message::role).collect()
    }

    #[test]
    fn lines_are_commands_or_something_to_say() {
        let set = |name: &str, value: &str| Command::Set { name: name.into(), value: value.into() };
        let cases = [
            ("", Command::Nothing),
            ("  \n", Command::Nothing),
            ("Hello /reset\n", Command::Say("Hello /reset".into())),
            ("/reset", Command::Reset),
            ("/system  Be brief. ", Command::System(Some("Be brief.".into()))),
            ("/system", Command::System(None)),
            ("/set temperature 0.2", set("temperature", "0.2")),
            ("/set temperature=0.2", set("temperature", "0.2")),
            ("/set stop a b", set("stop", "a b")),
            ("/set", Command::Show),
            ("/set temperature", Command::Unknown("/set temperature".into())),
            ("/quit", Command::Quit),
            ("/help", Command::Help),
            ("/etc/passwd", Command::Unknown("/etc/passwd".into())),
            ("//etc/passwd", Command::Say("/etc/passwd".into())),
        ];
        for (line, expected) in cases {
            assert_eq!(Command::parse(line), expected, "{line:?}");
        }
    }

    #[test]
    fn conversation_alternates_after_the_instructions() {
        let mut session = Session::new(Some("Be brief.".into()), SamplingParams::default());
        session.ask("Hi".into());
        session.answered("Hello".into());
        session.ask("And?".into());
        assert_eq!(roles(&session), [Role::System, Role::User, Role::Assistant, Role::User]);
    }

    #[test]
    fn question_without_an_answer_is_taken_back() {
        let mut session = Session::new(None, SamplingParams::default());
        session.ask("Hi".into());
        session.answered(String::new());
        assert_eq!(roles(&session), []);
    }

    #[test]
    fn reset_keeps_instructions_and_settings() {
        let mut session = Session::new(Some("Be brief.".into()), SamplingParams::default());
        session.ask("Hi".into());
        session.apply(&Command::parse("/set top_k 5")).unwrap();
        session.apply(&Command::Reset).unwrap();
        assert_eq!(roles(&session), [Role::System]);
        assert_eq!(session.sampling().top_k, Some(5));
    }

    #[test]
    fn wrong_commands_change_nothing_and_say_so() {
        let mut session = Session::new(None, SamplingParams::default());
        assert!(session.apply(&Command::parse("/sett x 1")).is_err());
        assert!(session.apply(&Command::parse("/set top_k many")).unwrap_err().contains("many"));
        assert_eq!(session.sampling(), &SamplingParams::default());
    }
}
