use std::net::SocketAddr;

use serde::Deserialize;

use super::*;

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Inner {
    max_connections: u32,
    ratio: f32,
    policy: Policy,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Policy {
    Wait,
    Refuse,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Model {
    name: String,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Sample {
    listen: SocketAddr,
    metrics_listen: Option<SocketAddr>,
    name: String,
    eager: bool,
    peers: Vec<String>,
    models: Vec<Model>,
    limits: Inner,
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:1".parse().unwrap(),
            metrics_listen: None,
            name: "sample".into(),
            eager: false,
            peers: vec!["a".into()],
            models: Vec::new(),
            limits: Inner { max_connections: 7, ratio: 0.5, policy: Policy::Wait },
        }
    }
}

const LIMITS: &[Key] = &[
    Key { path: "limits.max_connections", help: "Connections. Default: 7." },
    Key { path: "limits.ratio", help: "Ratio. Default: 0.5." },
    Key { path: "limits.policy", help: "Policy. Default: wait." },
];

impl Settings for Sample {
    const SERVICE: &'static str = "sample-svc";
    const KEYS: &'static [&'static [Key]] = &[
        LIMITS,
        &[
            Key { path: "listen", help: "Address." },
            Key { path: "metrics_listen", help: "Address." },
            Key { path: "name", help: "Name." },
            Key { path: "eager", help: "Whether." },
            Key { path: "peers", help: "Peers." },
            Key { path: "models", help: "Models." },
        ],
    ];

    fn validate(&self) -> Result<(), ConfigError> {
        if self.limits.max_connections == 0 {
            return Err(ConfigError::invalid("limits.max_connections", 0, "must be at least 1"));
        }
        Ok(())
    }
}

/// Loads with a file's text, `NAME=value` pairs and flags.
fn load_with(file: &str, env: &[&str], flags: &[&str]) -> Result<Command<Sample>, ConfigError> {
    let mut path = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut path, file.as_bytes()).unwrap();
    let mut args: Vec<OsString> = vec!["sample".into(), "--config".into(), path.path().into()];
    args.extend(flags.iter().map(OsString::from));
    let env = env.iter().map(|pair| {
        let (name, value) = pair.split_once('=').unwrap();
        (name.into(), value.into())
    });
    load_from(args.into_iter(), env)
}

fn run(file: &str, env: &[&str], flags: &[&str]) -> Sample {
    match load_with(file, env, flags) {
        Ok(Command::Run(settings)) => settings,
        other => panic!("{other:?}"),
    }
}

/// Expects an error whose one line holds all of these.
fn check_error(file: &str, env: &[&str], flags: &[&str], parts: &[&str]) {
    let text = load_with(file, env, flags).unwrap_err().to_string();
    assert!(!text.contains('\n'), "more than one line: {text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn keys_match_fields() {
    assert_keys_match_fields::<Sample>();
}

#[test]
fn without_any_source_the_defaults_hold() {
    assert_eq!(run("", &[], &[]), Sample::default());
}

#[test]
fn later_sources_win_key_by_key() {
    let file = "name = 'file'\nlisten = '127.0.0.1:2'\n[limits]\nmax_connections = 2\nratio = 0.25";
    let env = ["LOCKSTEP_SAMPLE_SVC__LISTEN=127.0.0.1:3", "LOCKSTEP_SAMPLE_SVC__LIMITS__MAX_CONNECTIONS=3"];
    let settings = run(file, &env, &["--limits.max-connections=4"]);
    assert_eq!(settings.name, "file");
    assert_eq!(settings.listen.port(), 3);
    assert_eq!(settings.limits, Inner { max_connections: 4, ratio: 0.25, policy: Policy::Wait });
}

#[test]
fn lists_come_with_commas_or_repeated_flags_and_replace_the_default() {
    assert_eq!(run("", &["LOCKSTEP_SAMPLE_SVC__PEERS=x, y"], &[]).peers, ["x", "y"]);
    assert_eq!(run("", &[], &["--peers", "x,y", "--peers", "z"]).peers, ["x", "y", "z"]);
    assert_eq!(run("peers = []", &[], &[]).peers, [""; 0]);
    assert_eq!(run("[[models]]\nname = 'm'", &[], &[]).models, [Model { name: "m".into() }]);
}

#[test]
fn strings_that_look_like_numbers_stay_strings() {
    let settings = run("", &["LOCKSTEP_SAMPLE_SVC__NAME=0123"], &["--peers=7"]);
    assert_eq!((settings.name.as_str(), settings.peers), ("0123", vec!["7".to_owned()]));
}

#[test]
fn boolean_flag_needs_no_value_and_takes_one() {
    assert!(run("", &[], &["--eager"]).eager);
    assert!(!run("eager = true", &[], &["--eager=false"]).eager);
}

#[test]
fn variables_of_kubernetes_are_not_settings() {
    assert_eq!(run("", &["LOCKSTEP_SAMPLE_SVC_PORT=tcp://10.0.0.1:80"], &[]), Sample::default());
}

#[test]
fn unknown_keys_are_refused_wherever_they_stand() {
    check_error("nmae = 'x'", &[], &[], &["unknown key `nmae`", "file /"]);
    check_error("[limits]\nfoo = 1", &[], &[], &["`limits.foo`"]);
    check_error("[name]\nfoo = 1", &[], &[], &["`name`"]);
    check_error("[[models]]\nname = 'm'\nsize = 1", &[], &[], &["models", "size"]);
    check_error("", &["LOCKSTEP_SAMPLE_SVC__NMAE=x"], &[], &["`nmae`", "LOCKSTEP_SAMPLE_SVC__NMAE"]);
    check_error("", &[], &["--nmae", "x"], &["--nmae"]);
}

#[test]
fn bad_values_name_key_source_and_value() {
    check_error("listen = 'here'", &[], &[], &["`listen`", "here", "file /"]);
    check_error("", &["LOCKSTEP_SAMPLE_SVC__LISTEN=there"], &[], &["`listen`", "there", "SVC__LISTEN"]);
    check_error("", &[], &["--metrics-listen", "x"], &["`metrics_listen`", "`x`", "flag --metrics-listen"]);
    check_error("", &[], &["--limits.max-connections", "-1"], &["`limits.max_connections`", "-1"]);
    check_error("", &[], &["--limits.max-connections=4294967296"], &["`limits.max_connections`", "4294967296"]);
    check_error("", &[], &["--models", "a, b"], &["`models` = `a,b` from flag --models: "]);
    let variants = "= `drop` from flag --limits.policy: unknown variant `drop`, expected `wait` or `refuse`";
    check_error("", &[], &["--limits.policy=drop"], &["`limits.policy`", variants]);
}

#[test]
fn values_are_not_bent_into_another_type() {
    check_error("[limits]\nmax_connections = 1.5", &[], &[], &["`limits.max_connections`", "1.5"]);
    check_error("[limits]\nmax_connections = true", &[], &[], &["`limits.max_connections`", "true"]);
    check_error("", &[], &["--limits.max-connections=yes"], &["`limits.max_connections`", "yes"]);
    check_error("eager = 1", &[], &[], &["`eager`", "1"]);
    assert_eq!(run("", &[], &["--limits.ratio=0.1"]).limits.ratio, 0.1);
}

#[test]
fn broken_rule_names_the_source_that_broke_it() {
    let env = ["LOCKSTEP_SAMPLE_SVC__LIMITS__MAX_CONNECTIONS=0"];
    check_error("", &env, &[], &["at least 1", "environment variable LOCKSTEP_SAMPLE_SVC__LIMITS__MAX_CONNECTIONS"]);
}

#[test]
fn unreadable_file_is_named_with_the_place() {
    check_error("a b", &[], &[], &["config file /", "line 1"]);
    let args = ["sample", "--config", "/nonexistent/x.toml"].map(OsString::from);
    let text = load_from::<Sample>(args.into_iter(), std::iter::empty()).unwrap_err().to_string();
    assert!(text.starts_with("config file /nonexistent/x.toml: "), "{text}");
}

#[test]
fn printed_settings_load_back() {
    let Ok(Command::Print(text)) = load_with("name = 'n'", &[], &["--print-config", "--listen=[::1]:5"]) else {
        panic!("no print");
    };
    let settings = run(&text, &[], &[]);
    assert_eq!((settings.name.as_str(), settings.listen.port()), ("n", 5));
}

#[test]
fn help_lists_every_key() {
    let Ok(Command::Help(text)) = load_with("", &[], &["--help"]) else { panic!("no help") };
    for part in ["--limits.max-connections", "--metrics-listen", "LOCKSTEP_SAMPLE_SVC__"] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
}
