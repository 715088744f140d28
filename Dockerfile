# An image with etcd-ferry and the libraries that it is linked with, and nothing else: no shell, no package manager, no root.
#
#     docker build --build-arg COMMIT="$(git rev-parse --short=12 HEAD)" -t etcd-ferry:0.1.0 .
#     docker run --rm etcd-ferry:0.1.0 --version

FROM rust:1.90-slim-bookworm AS build
# A suite of Debian only moves by fixes, which are wanted.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libprotobuf-dev protobuf-compiler \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY proto proto
COPY src src
COPY deploy/rootfs deploy/rootfs
ARG COMMIT
# cargo wants every target that Cargo.toml names, also those that are not built here.
RUN mkdir -p benches/pipeline tests/it tests/mutants \
    && touch benches/encode.rs benches/pipeline/main.rs benches/segment.rs tests/it/main.rs tests/mutants/main.rs \
    && ETCD_FERRY_COMMIT="$COMMIT" cargo build --release --locked --bin etcd-ferry \
    && deploy/rootfs target/release/etcd-ferry /rootfs

FROM scratch
COPY --from=build /rootfs /
# A number, so that Kubernetes can see that it is not root's.
USER 65532:65532
EXPOSE 7443 7445
ENTRYPOINT ["/usr/bin/etcd-ferry"]
CMD ["run", "--config", "/etc/etcd-ferry/etcd-ferry.toml"]
