//! Compiles the protos without protoc: protox parses, tonic-prost-build generates. Says which commit is built, and how.

mod commit;

use std::error::Error;
use std::path::Path;
use std::process::Command;

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
    name_the_build()
}

fn prost_encode(descriptors: &impl prost::Message) -> Vec<u8> {
    descriptors.encode_to_vec()
}

/// For src/software.rs. A build without git, such as that of an image, may be given its commit in the environment.
fn name_the_build() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=ETCD_FERRY_COMMIT");
    let root = std::env::var("CARGO_MANIFEST_DIR")?;
    let root = Path::new(&root);
    let given = std::env::var("ETCD_FERRY_COMMIT").ok().filter(|commit| !commit.is_empty());
    let commit = given.unwrap_or_else(|| commit::of(root));
    println!("cargo:rustc-env=ETCD_FERRY_COMMIT={commit}");
    // Whether the sources are as committed changes with any of them.
    for path in commit::files(root).iter().map(AsRef::as_ref).chain([Path::new("src"), Path::new("Cargo.lock")]) {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    let (profile, target) = (std::env::var("PROFILE")?, std::env::var("TARGET")?);
    let version = Command::new(std::env::var("RUSTC")?).arg("--version").output()?;
    let rustc = String::from_utf8_lossy(&version.stdout);
    // As `rustc 1.95.0 (59807616e 2026-04-14)`.
    let rustc = rustc.split(" (").next().unwrap_or_default().trim();
    println!("cargo:rustc-env=ETCD_FERRY_BUILD={profile}, {target}, {rustc}");
    Ok(())
}
