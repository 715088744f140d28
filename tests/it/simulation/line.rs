//! Job: one stream between two sidecars: what is on its way in both directions, and what a bad line does to it.
//! Input: shipments, receipts. Output: the same; frames and acknowledgements may be lost, repeated or overtaken while faults happen.
//! Pure: no clock, no I/O.
//! Always true: what must come in order (resets, refusals) does, or the stream ends: a real stream breaks rather than lose them.

use super::region::Context;
use bytes::Bytes;
use etcd_ferry::model::{KeyRange, Revision};
use etcd_ferry::replica::pages::Begin;
use etcd_ferry::wire::replicate::refusal::Kind;
use etcd_ferry::wire::replicate::{Ack, CopyAck, Progress};
use std::collections::VecDeque;

#[derive(Clone)]
pub enum Shipment {
    Frame(Bytes),
    Progress(Progress),
    Begin(Box<Begin>),
    Keys { range: KeyRange, keys: Vec<Bytes>, last: bool },
    Page { range: KeyRange, revision: Revision, kvs: Vec<(Bytes, Bytes)> },
    End { anchor: Revision },
}

#[derive(Clone)]
pub enum Receipt {
    Ack(Box<Ack>),
    Reset(u64),
    CopyAck(Box<CopyAck>),
    Refusal(Kind, String),
}

#[derive(Default)]
pub struct Line {
    pub shipments: VecDeque<Shipment>,
    pub receipts: VecDeque<Receipt>,
}

impl Line {
    pub fn ship(&mut self, context: &mut Context, mut shipment: Shipment) {
        let name = shipment.name();
        if let Shipment::Frame(frame) = &mut shipment
            && context.fails(context.frames_damaged, "frame damaged")
        {
            let mut bytes = frame.to_vec();
            let at = context.random.below(bytes.len());
            bytes[at] ^= 1 << context.random.below(8);
            *frame = bytes.into();
        }
        if context.fails(12, &format!("{name} dropped")) {
            return;
        }
        let at = place(self.shipments.len(), context, name);
        if context.fails(12, &format!("{name} repeated")) {
            self.shipments.push_back(shipment.clone());
        }
        self.shipments.insert(at, shipment);
    }

    pub fn receipt(&mut self, context: &mut Context, receipt: Receipt) {
        let Receipt::Ack(_) = &receipt else { return self.receipts.push_back(receipt) };
        if context.fails(30, "ack dropped") {
            return;
        }
        let at = place(self.receipts.len(), context, "ack");
        if context.fails(30, "ack repeated") {
            self.receipts.push_back(receipt.clone());
        }
        self.receipts.insert(at, receipt);
    }
}

fn place(len: usize, context: &mut Context, name: &str) -> usize {
    let overtakes = len > 0 && context.fails(12, &format!("{name} reordered"));
    if overtakes { len - 1 } else { len }
}

impl Shipment {
    fn name(&self) -> &'static str {
        match self {
            Shipment::Frame(_) => "frame",
            Shipment::Progress(_) => "progress",
            Shipment::Begin(_) | Shipment::Keys { .. } | Shipment::Page { .. } | Shipment::End { .. } => "page",
        }
    }
}
