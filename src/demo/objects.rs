//! Job: objects as Kubernetes keeps them in etcd, to write in demo, tests and benchmarks.
//! Input: which object, which version of it, a size. Output: its key and its JSON.
//! Pure: the same input gives the same bytes.
//! Always true: two versions of one object differ in a timestamp, a counter and a version, about 5 % of the bytes.

use bytes::Bytes;

/// The object without padding is about this long.
pub const OBJECT_BYTES: usize = 860;

const KINDS: [&str; 4] = ["pods", "configmaps", "leases", "endpointslices"];
const SPACES: [&str; 3] = ["default", "kube-system", "shop"];

/// The key of object `number` below `prefix`, such as `/registry/`.
pub fn key(prefix: &str, number: u64) -> Bytes {
    let kind = KINDS[pick(number, KINDS.len())];
    let space = SPACES[pick(number / 7, SPACES.len())];
    Bytes::from(format!("{prefix}{kind}/{space}/object-{number:06}"))
}

/// Object `number` as of its `version`, padded to `bytes_min` with lines of its own, such as a large ConfigMap holds.
pub fn value(number: u64, version: u64, bytes_min: usize) -> Bytes {
    let kind = KINDS[pick(number, KINDS.len())];
    let space = SPACES[pick(number / 7, SPACES.len())];
    let uid = scramble(number);
    let seconds = version % 60;
    let minutes = version / 60 % 60;
    let hours = version / 3_600 % 24;
    let mut object = format!(
        concat!(
            r#"{{"apiVersion":"v1","kind":"{kind}","metadata":{{"name":"object-{number:06}","namespace":"{space}","#,
            r#""uid":"{uid:016x}-{owner:08x}","resourceVersion":"{version}","generation":{version},"#,
            r#""creationTimestamp":"2026-01-02T03:04:05Z","labels":{{"app":"app-{app}","tier":"backend","pod-template-hash":"{hash:010x}"}},"#,
            r#""ownerReferences":[{{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"app-{app}","uid":"{owner:016x}","controller":true}}],"#,
            r#""managedFields":[{{"manager":"kubelet","operation":"Update","time":"2026-02-03T{hours:02}:{minutes:02}:{seconds:02}Z"}}]}},"#,
            r#""spec":{{"nodeName":"node-{node}","serviceAccountName":"default","restartPolicy":"Always","terminationGracePeriodSeconds":30}},"#,
            r#""status":{{"phase":"Running","observedGeneration":{version},"podIP":"10.0.{node}.{app}","qosClass":"Burstable","#,
            r#""conditions":[{{"type":"Ready","status":"True","lastHeartbeatTime":"2026-02-03T{hours:02}:{minutes:02}:{seconds:02}Z"}}]}}}}"#,
        ),
        kind = kind,
        number = number,
        space = space,
        uid = uid,
        owner = scramble(uid),
        version = version,
        app = number % 200,
        hash = scramble(number % 200) >> 24,
        hours = hours,
        minutes = minutes,
        seconds = seconds,
        node = number % 50,
    );
    let mut word = uid;
    for line in 0.. {
        if object.len() >= bytes_min {
            break;
        }
        word = scramble(word);
        object.push_str(&format!(
            "\n# setting {line:04}\nservice.{kind}.endpoint-{line:04} = {:08x}.{space}.svc",
            word >> 32
        ));
    }
    Bytes::from(object)
}

fn pick(number: u64, choices: usize) -> usize {
    usize::try_from(scramble(number) % choices.max(1) as u64).unwrap_or(0)
}

/// SplitMix64: spreads a small number over 64 bits.
fn scramble(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_one_object_differ_in_about_a_twentieth_of_their_bytes() {
        let (one, two) = (value(17, 41_000, 0), value(17, 41_009, 0));
        assert_eq!(one.len(), two.len());
        assert!(one.len().abs_diff(OBJECT_BYTES) < 60, "{} B", one.len());
        let differing = one.iter().zip(&two).filter(|(a, b)| a != b).count();
        assert!((1..one.len() / 15).contains(&differing), "{differing} of {} B differ", one.len());
    }

    #[test]
    fn an_object_is_json_of_its_own_and_the_same_each_time() {
        let object: serde_json::Value = serde_json::from_slice(&value(3, 9, 0)).unwrap();
        assert_eq!(object["metadata"]["generation"], 9);
        assert_eq!(value(3, 9, 0), value(3, 9, 0));
        assert_ne!(value(3, 9, 0), value(4, 9, 0));
        assert!(value(3, 9, 100_000).len() >= 100_000);
        assert_ne!(key("/registry/", 3), key("/registry/", 4));
    }
}
