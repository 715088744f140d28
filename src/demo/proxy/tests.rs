//! Job: what the proxy does to a link, seen from both of its ends.
//! Input: an echo server behind a proxy. Output: passes or fails.
//! Always true: what must not arrive is waited for a bounded time, what must arrive is read.

use super::*;

const WAIT: Duration = Duration::from_secs(10);

/// A server that sends back what it gets, behind a proxy.
async fn echo() -> (LinkProxy, JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let target = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    (LinkProxy::start(target).await.unwrap(), server)
}

async fn read_exactly(stream: &mut TcpStream, bytes: usize) -> io::Result<Vec<u8>> {
    let mut got = vec![0; bytes];
    tokio::time::timeout(WAIT, stream.read_exact(&mut got)).await.map_err(io::Error::other)??;
    Ok(got)
}

#[tokio::test]
async fn bytes_cross_unchanged_and_are_counted() {
    let (proxy, _server) = echo().await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    stream.write_all(b"revision").await.unwrap();
    assert_eq!(read_exactly(&mut stream, 8).await.unwrap(), b"revision");
    assert_eq!(proxy.counters(), Counters { bytes_to_target: 8, bytes_from_target: 8, connections: 1 });
}

#[tokio::test]
async fn a_delay_is_paid_once_by_what_is_sent_in_a_row() {
    let (proxy, _server) = echo().await;
    proxy.set_delay(Duration::from_millis(50));
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    let start = Instant::now();
    let (mut from, mut to) = stream.split();
    let send = async {
        for _ in 0..20 {
            to.write_all(&[7; 100]).await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    let mut got = [0; 2_000];
    let receive = async { from.read_exact(&mut got).await.unwrap() };
    tokio::join!(send, receive);
    let elapsed = start.elapsed();
    assert!(elapsed >= Duration::from_millis(100), "{elapsed:?}");
    assert!(elapsed < Duration::from_millis(1_000), "20 stop-and-wait round trips take 2 s, this took {elapsed:?}");
}

#[tokio::test]
async fn a_narrow_link_carries_its_rate_and_no_more() {
    let (proxy, _server) = echo().await;
    proxy.set_rate(Some(1_000_000));
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    let start = Instant::now();
    let (mut from, mut to) = stream.split();
    let mut got = vec![0; 300_000];
    let (sent, received) = tokio::join!(to.write_all(&[7; 300_000]), from.read_exact(&mut got));
    sent.unwrap();
    received.unwrap();
    let elapsed = start.elapsed();
    assert!((290..1_500).contains(&elapsed.as_millis()), "{elapsed:?} for 0.3 s of line");
}

#[tokio::test]
async fn a_cut_ends_old_and_new_connections_until_it_is_healed() {
    let (proxy, _server) = echo().await;
    let mut old = TcpStream::connect(proxy.address()).await.unwrap();
    old.write_all(b"a").await.unwrap();
    read_exactly(&mut old, 1).await.unwrap();
    proxy.cut();
    assert_eq!(read_exactly(&mut old, 1).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    if let Ok(mut new) = TcpStream::connect(proxy.address()).await {
        read_exactly(&mut new, 1).await.unwrap_err();
    }
    proxy.heal();
    let mut healed = TcpStream::connect(proxy.address()).await.unwrap();
    healed.write_all(b"b").await.unwrap();
    assert_eq!(read_exactly(&mut healed, 1).await.unwrap(), b"b");
}

#[tokio::test]
async fn what_waits_in_a_frozen_direction_arrives_after_it() {
    let (proxy, _server) = echo().await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    proxy.freeze(Direction::FromTarget);
    stream.write_all(b"wait").await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(100), stream.read_u8()).await;
    assert!(early.is_err(), "a frozen direction let a byte through");
    proxy.heal();
    assert_eq!(read_exactly(&mut stream, 4).await.unwrap(), b"wait");
}

#[tokio::test]
async fn a_black_hole_keeps_the_connection_and_swallows_what_is_sent() {
    let (proxy, _server) = echo().await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    stream.write_all(b"a").await.unwrap();
    read_exactly(&mut stream, 1).await.unwrap();
    proxy.black_hole(Direction::ToTarget);
    stream.write_all(b"lost").await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(100), stream.read_u8()).await;
    assert!(early.is_err(), "the connection should neither answer nor end");
    proxy.heal();
    assert_eq!(read_exactly(&mut stream, 1).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn one_bit_is_flipped_where_it_was_asked_for() {
    let (proxy, _server) = echo().await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    proxy.flip_bit(Direction::ToTarget, 5, 0);
    for part in [[0; 4], [0; 4]] {
        stream.write_all(&part).await.unwrap();
    }
    assert_eq!(read_exactly(&mut stream, 8).await.unwrap(), [0, 0, 0, 0, 0, 1, 0, 0]);
}
