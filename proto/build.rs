//! Compiles the protos without protoc: protox parses, tonic-prost-build generates.

use std::error::Error;

const ADMIN: &str = "proto/admin.proto";
const REPLICATE: &str = "proto/replicate.proto";

fn main() -> Result<(), Box<dyn Error>> {
    for proto in [ADMIN, REPLICATE] {
        println!("cargo:rerun-if-changed={proto}");
    }
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), prost_encode(&protox::compile([REPLICATE, ADMIN], ["proto"])?))?;
    let build = || tonic_prost_build::configure().bytes(".");
    build().compile_fds(protox::compile([ADMIN], ["proto"])?)?;
    // Peers say nothing without a checksum.
    build().codec_path("crate::wire::codec::CheckedCodec").compile_fds(protox::compile([REPLICATE], ["proto"])?)?;
    Ok(())
}

fn prost_encode(descriptors: &impl prost::Message) -> Vec<u8> {
    descriptors.encode_to_vec()
}
