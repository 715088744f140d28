//! Job: a connection whose peer is judged again whenever the certificates in use change.
//! Input: a stream after its handshake, the peer's certificates, the sets in use. Output: the same stream, until its peer fails.
//! Always true: a peer that a new handshake would refuse is cut at the first change that says so; nothing else is cut.

use super::explain::explain;
use super::reload::InUse;
use rustls::pki_types::CertificateDer;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_stream::wrappers::WatchStream;

/// As whom the other side was let in.
#[derive(Debug, Clone)]
pub enum As {
    Client,
    /// It must bear one of these SANs.
    Server(Vec<String>),
}

/// Who is at the other end, for the next time that it is judged.
pub struct Peer {
    /// As it was presented: leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    pub of: As,
    /// For the log.
    pub at: String,
}

/// A stream that ends with an error once its peer is refused.
pub struct Rechecked<S, K = ()> {
    stream: S,
    again: Option<(Peer, WatchStream<Arc<InUse>>)>,
    refused: bool,
    /// What whoever made it keeps for as long as the connection lasts.
    pub(super) kept: K,
}

impl<S> Rechecked<S> {
    /// For a connection that is too short to outlive its certificates.
    pub fn never(stream: S) -> Self {
        Self { stream, again: None, refused: false, kept: () }
    }
}

impl<S, K> Rechecked<S, K> {
    /// `in_use`: whose last seen value judged the handshake.
    pub fn new(stream: S, peer: Peer, in_use: watch::Receiver<Arc<InUse>>, kept: K) -> Self {
        Self { stream, again: Some((peer, WatchStream::from_changes(in_use))), refused: false, kept }
    }

    pub fn get_ref(&self) -> &S {
        &self.stream
    }

    /// Whoever reads is woken by a change: a connection of HTTP/2 always reads.
    fn recheck(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while let Some((peer, changes)) = &mut self.again {
            match Pin::new(changes).poll_next(cx) {
                Poll::Ready(Some(in_use)) => {
                    if let Err(error) = in_use.judge(peer) {
                        let reason = explain(&error);
                        tracing::warn!(peer = %peer.at, %reason, "a connection is cut since certificates were reloaded");
                        (self.refused, self.again) = (true, None);
                    }
                }
                Poll::Ready(None) => self.again = None,
                Poll::Pending => break,
            }
        }
        self.may_go_on()
    }

    fn may_go_on(&self) -> io::Result<()> {
        if self.refused {
            let reason = "the peer's certificate is refused since certificates were reloaded";
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason));
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin, K: Unpin> AsyncRead for Rechecked<S, K> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.recheck(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin, K: Unpin> AsyncWrite for Rechecked<S, K> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.may_go_on()?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.may_go_on()?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
