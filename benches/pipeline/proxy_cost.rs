//! Job: what the line itself costs, beside a direct connection.
//! Input: an echo server. Output: what a round trip and a megabyte cost more through the proxy.
//! Always true: both ways are measured in one run, by the same code.

use crate::rig::cpu_seconds;
use etcd_ferry::demo::proxy::LinkProxy;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

/// What the proxy itself adds: microseconds to a round trip of one byte, and CPU for each megabyte.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct ProxyCost {
    pub round_trip_added_micros: f64,
    pub cpu_millis_a_megabyte: f64,
    pub megabytes_a_second: f64,
}

pub async fn measure() -> io::Result<ProxyCost> {
    const ROUND_TRIPS: u32 = 2_000;
    const MEGABYTES: usize = 200;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let target = listener.local_addr()?;
    let echo = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.set_nodelay(true)?;
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
        Ok::<_, io::Error>(())
    });
    let proxy = LinkProxy::start(target).await?;
    let mut medians = [0.0; 2];
    for (at, address) in [target, proxy.address()].into_iter().enumerate() {
        let mut stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let mut times = Vec::new();
        for _ in 0..ROUND_TRIPS {
            let began = Instant::now();
            stream.write_all(b"x").await?;
            stream.read_u8().await?;
            times.push(began.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        medians[at] = times[times.len() / 2] * 1e6;
    }
    let mut costs = [(0.0, 0.0); 2];
    for (at, address) in [target, proxy.address()].into_iter().enumerate() {
        let (mut read, mut write) = TcpStream::connect(address).await?.into_split();
        let (began, cpu) = (Instant::now(), cpu_seconds(std::process::id()));
        let sending = tokio::spawn(async move {
            let megabyte = vec![0; 1_000_000];
            for _ in 0..MEGABYTES {
                write.write_all(&megabyte).await?;
            }
            Ok::<_, io::Error>(write)
        });
        let mut buffer = vec![0; 256 * 1024];
        let mut left = MEGABYTES * 1_000_000;
        while left > 0 {
            left -= read.read(&mut buffer).await?;
        }
        drop(sending.await);
        costs[at] = (began.elapsed().as_secs_f64(), cpu_seconds(std::process::id()) - cpu);
    }
    echo.abort();
    Ok(ProxyCost {
        round_trip_added_micros: medians[1] - medians[0],
        // There and back.
        cpu_millis_a_megabyte: (costs[1].1 - costs[0].1) * 1e3 / (2.0 * MEGABYTES as f64),
        megabytes_a_second: 2.0 * MEGABYTES as f64 / costs[1].0,
    })
}
