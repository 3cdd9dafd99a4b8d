//! Compiles the `.proto` files with protox, so that a fresh machine needs no `protoc`.

use std::{env, error::Error, path::PathBuf};

const FILES: [&str; 7] = [
    "lockstep/v1/inference_service.proto",
    "lockstep/v1/model_service.proto",
    "lockstep/tokenizer/v1/tokenizer_service.proto",
    "lockstep/worker/v1/worker_service.proto",
    "lockstep/worker/v1/group_service.proto",
    "inference/grpc_service.proto",
    "vllm/grpc/engine/vllm_engine.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let files: Vec<PathBuf> = FILES.iter().map(|file| root.join(file)).collect();
    let descriptors = protox::compile(&files, [&root])?;
    let descriptor_path = PathBuf::from(env::var("OUT_DIR")?).join("lockstep_descriptor.bin");
    std::fs::write(&descriptor_path, prost::Message::encode_to_vec(&descriptors))?;
    let services = tonic_prost_build::configure().build_transport(false).codec_path("crate::codec::Codec");
    services.compile_fds(descriptors)?;
    for folder in ["lockstep", "inference", "smg", "vllm"] {
        println!("cargo:rerun-if-changed={folder}");
    }
    Ok(())
}
