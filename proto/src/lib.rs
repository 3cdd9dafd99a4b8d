//! The wire contract of Lockstep, and what all its services must do alike with it.
//!
//! The contract itself is in the `.proto` files beside this crate; the modules below hold only what every service
//! needs in the same form.
//!
//! # As a client
//!
//! A client of a cluster enables the feature `client` alone and sees no server code: the generated clients in [`v1`] over a
//! channel of `client::connect_lazy`, deadlines by `client::with_deadline`, and [`error::Error::from_status`] for what a
//! refusal says. `examples/chat.rs` is a whole one.
//!
//! # Layout
//!
//! * [`v1`]: what clients call; [`inference`]: the same for clients of KServe and Triton; [`tokenizer`] and [`worker`]:
//!   what the services say to one another; [`vllm`] and [`smg`]: what other gateways say to workers.
//! * [`codec`]: how messages become bytes; [`announcement`]: how a service says where it listens; [`error`]: how a refusal
//!   crosses the wire; [`fields`]: how it names what is wrong to clients of other protocols; [`trace`]: how a call is known
//!   on its way.
//! * `client` (feature `client`): channels with limits, and deadlines.
//! * `config`, `server`, `telemetry` (feature `server`): settings, everything around the RPCs, logs and metrics.
#![forbid(unsafe_code)]

pub mod announcement;
pub mod codec;
pub mod error;
pub mod fields;
pub mod trace;

#[cfg(feature = "client")]
pub mod client;

#[cfg(feature = "server")]
pub mod config;
#[cfg(feature = "server")]
pub mod server;
#[cfg(feature = "server")]
pub mod telemetry;

/// What clients call: `InferenceService` and `ModelService`.
#[allow(missing_docs, clippy::doc_markdown, clippy::too_many_lines, reason = "generated from documented .proto files")]
pub mod v1 {
    tonic::include_proto!("lockstep.v1");
}

/// What clients of KServe and Triton call: `GRPCInferenceService`.
#[allow(missing_docs, clippy::doc_markdown, clippy::too_many_lines, reason = "generated from documented .proto files")]
pub mod inference {
    tonic::include_proto!("inference");
}

/// What the tokenizer service answers.
pub mod tokenizer {
    /// Version 1.
    #[allow(missing_docs, clippy::too_many_lines, reason = "generated from documented .proto files")]
    pub mod v1 {
        tonic::include_proto!("lockstep.tokenizer.v1");
    }
}

/// What a worker group answers, to the gateway and to its own ranks.
pub mod worker {
    /// Version 1.
    #[allow(missing_docs, clippy::too_many_lines, reason = "generated from documented .proto files")]
    pub mod v1 {
        tonic::include_proto!("lockstep.worker.v1");
    }
}

/// What gateways call that speak to vLLM: `VllmEngine`.
pub mod vllm {
    /// Their packages.
    pub mod grpc {
        /// The interface to an engine.
        #[allow(
            missing_docs,
            clippy::doc_markdown,
            clippy::large_enum_variant,
            clippy::too_many_lines,
            reason = "generated from documented .proto files"
        )]
        pub mod engine {
            tonic::include_proto!("vllm.grpc.engine");
        }
    }
}

/// What the Shepherd Model Gateway's interfaces have in common.
pub mod smg {
    /// Their packages.
    pub mod grpc {
        /// The tokenizer's files, and events of the prefix cache.
        #[allow(
            missing_docs,
            clippy::doc_markdown,
            clippy::too_many_lines,
            reason = "generated from documented .proto files"
        )]
        pub mod common {
            tonic::include_proto!("smg.grpc.common");
        }
    }
}

/// The compiled descriptors of every `.proto` file, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("lockstep_descriptor");
