//! Job: hold the Kubernetes manifests against Kubernetes' types and against the product: ports, paths, files, configurations.
//! Input: deploy/kubernetes/. Output: passes or fails.
//! Edge: reads files.
//! Always true: a field that Kubernetes does not know is found: what is parsed into types and written again is what stands in the file.

use super::file;
use crate::documents;
use etcd_ferry::config::Config;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Container, PodSpec, Probe, Secret, Service};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPort};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// Every object of every file, with the file's name.
fn objects() -> Vec<(String, Value)> {
    let mut objects = Vec::new();
    for entry in fs::read_dir(file("deploy/kubernetes")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&path).unwrap();
        let parsed: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
        objects.extend(parsed.into_iter().map(|object| (name.clone(), object)));
    }
    assert!(objects.len() >= 10, "the manifests were not found");
    objects
}

/// The objects of a type, by the file and the name that they have.
fn all<T: DeserializeOwned>(kind: &str) -> BTreeMap<(String, String), T> {
    let of_kind = objects().into_iter().filter(|(_, object)| object["kind"] == kind);
    of_kind
        .map(|(file, object)| {
            let name = object["metadata"]["name"].as_str().unwrap().to_owned();
            ((file, name), serde_json::from_value(object).unwrap())
        })
        .collect()
}

fn one<T: DeserializeOwned>(kind: &str) -> T {
    let mut found: Vec<T> = all(kind).into_values().collect();
    assert_eq!(found.len(), 1, "one {kind}");
    found.remove(0)
}

/// The object as its type says it, after what the type does not know is lost.
fn typed<T: DeserializeOwned + Serialize>(object: &Value) -> Result<Value, String> {
    let typed: T = serde_json::from_value(object.clone()).map_err(|e| e.to_string())?;
    serde_json::to_value(typed).map_err(|e| e.to_string())
}

fn as_kubernetes_knows(object: &Value) -> Result<Value, String> {
    match (object["apiVersion"].as_str(), object["kind"].as_str()) {
        (Some("apps/v1"), Some("StatefulSet")) => typed::<StatefulSet>(object),
        (Some("v1"), Some("ConfigMap")) => typed::<ConfigMap>(object),
        (Some("v1"), Some("Secret")) => typed::<Secret>(object),
        (Some("v1"), Some("Service")) => typed::<Service>(object),
        (Some("networking.k8s.io/v1"), Some("NetworkPolicy")) => typed::<NetworkPolicy>(object),
        (Some("policy/v1"), Some("PodDisruptionBudget")) => typed::<PodDisruptionBudget>(object),
        (version, kind) => Err(format!("{version:?} {kind:?} is none that this test knows")),
    }
}

#[test]
fn every_manifest_is_of_a_kubernetes_type_and_holds_nothing_that_the_type_does_not_know() {
    for (file, object) in objects() {
        assert_eq!(as_kubernetes_knows(&object), Ok(object.clone()), "{file}");
    }
}

#[test]
fn a_field_that_is_misspelt_is_found() {
    let (_, mut object) = objects().into_iter().find(|(_, object)| object["kind"] == "StatefulSet").unwrap();
    let container = &mut object["spec"]["template"]["spec"]["containers"][1];
    let probe = container["livenessProbe"].take();
    container["livenesProbe"] = probe;
    assert_ne!(as_kubernetes_knows(&object), Ok(object));
}

fn pod() -> PodSpec {
    one::<StatefulSet>("StatefulSet").spec.unwrap().template.spec.unwrap()
}

fn container(name: &str) -> Container {
    pod().containers.into_iter().find(|container| container.name == name).unwrap()
}

fn port_of(container: &Container, name: &str) -> i32 {
    let mut ports = container.ports.iter().flatten();
    ports.find(|port| port.name.as_deref() == Some(name)).unwrap_or_else(|| panic!("no port {name}")).container_port
}

/// Each pod's configuration, by the file of its ConfigMap and its own name.
fn configurations() -> BTreeMap<(String, String), Config> {
    let mut configurations = BTreeMap::new();
    for ((file, _), map) in all::<ConfigMap>("ConfigMap") {
        for (name, text) in map.data.unwrap().into_iter().filter(|(name, _)| name.ends_with(".toml")) {
            let config = Config::from_toml(&text).unwrap_or_else(|faults| panic!("{file}: {name}: {faults}"));
            configurations.insert((file.clone(), name), config);
        }
    }
    configurations
}

#[test]
fn each_pod_has_a_sound_configuration_of_its_own_and_no_two_bear_one_node() {
    let set: StatefulSet = one("StatefulSet");
    let spec = set.spec.unwrap();
    let name = set.metadata.name.unwrap();
    let pods: BTreeSet<String> = (0..spec.replicas.unwrap()).map(|pod| format!("{name}-{pod}.toml")).collect();
    let configurations = configurations();
    for file in ["config-origin.yaml", "config-replica.yaml"] {
        let of_file: Vec<_> = configurations.iter().filter(|((of, _), _)| of == file).collect();
        let names: BTreeSet<String> = of_file.iter().map(|((_, name), _)| name.clone()).collect();
        assert_eq!(names, pods, "{file}");
        let nodes: BTreeSet<&str> = of_file.iter().map(|(_, config)| config.node.as_str()).collect();
        assert_eq!(nodes.len(), pods.len(), "{file}: each sidecar has its own node");
    }
    let sends =
        |file: &str| configurations.iter().filter(|((of, _), config)| of == file && !config.send.is_empty()).count();
    assert_eq!((sends("config-origin.yaml"), sends("config-replica.yaml")), (pods.len(), 0));
}

#[test]
fn the_sidecar_finds_its_configuration_its_secrets_and_its_data_where_they_are_mounted() {
    let sidecar = container("etcd-ferry");
    let mounts = sidecar.volume_mounts.clone().unwrap();
    let mounted = |path: &str| -> String {
        let mount = mounts.iter().find(|mount| path.starts_with(&format!("{}/", mount.mount_path)));
        mount.unwrap_or_else(|| panic!("{path} is on no volume")).name.clone()
    };
    let volumes = pod().volumes.unwrap();
    let secret_of = |volume: &str| -> String {
        let volume = volumes.iter().find(|found| found.name == volume).unwrap();
        volume.secret.as_ref().unwrap().secret_name.clone().unwrap()
    };
    let secrets = all::<Secret>("Secret");
    let args = sidecar.args.clone().unwrap();
    assert_eq!((args[0].as_str(), args[1].as_str(), mounted(&args[2]).as_str()), ("run", "--config", "ferry-config"));
    for ((_, name), config) in configurations() {
        assert!(args[2].ends_with("/$(POD_NAME).toml"), "the file of {name}");
        assert_eq!(mounted(&config.data_dir.to_string_lossy()), "ferry-data");
        let etcd = config.etcd;
        let files = [Some(config.tls.ca), Some(config.tls.cert), Some(config.tls.key), etcd.ca, etcd.cert, etcd.key];
        for path in files.into_iter().flatten() {
            let secret = secret_of(&mounted(&path.to_string_lossy()));
            let held = secrets.iter().find(|((_, name), _)| *name == secret).unwrap().1.string_data.clone().unwrap();
            assert!(
                held.contains_key(&*path.file_name().unwrap().to_string_lossy()),
                "{secret} holds no {}",
                path.display()
            );
        }
    }
    for volume in volumes.iter().filter_map(|volume| volume.secret.as_ref()) {
        let name = volume.secret_name.as_ref().unwrap();
        assert!(secrets.iter().any(|((_, known), _)| known == name), "{name} is in secrets.yaml");
        let created = format!("create secret generic {name} ");
        assert!(documents::text("docs/operating.md").contains(&created), "docs/operating.md makes {name}");
        assert_eq!(volume.default_mode, Some(0o440), "what the sidecar accepts of a key that is root's");
    }
}

fn path_and_port(probe: &Option<Probe>) -> (String, IntOrString) {
    let get = probe.clone().unwrap().http_get.unwrap();
    (get.path.unwrap(), get.port)
}

#[test]
fn a_link_that_does_not_follow_neither_restarts_the_sidecar_nor_takes_etcd_out_of_its_service() {
    let sidecar = container("etcd-ferry");
    let http = IntOrString::String("ferry-http".to_owned());
    for probe in [&sidecar.startup_probe, &sidecar.readiness_probe, &sidecar.liveness_probe] {
        assert_eq!(path_and_port(probe), ("/healthz".to_owned(), http.clone()));
    }
    for config in configurations().values() {
        assert_eq!(i32::from(config.listen.http.port()), port_of(&sidecar, "ferry-http"));
        assert_eq!(i32::from(config.listen.peer.port()), port_of(&sidecar, "ferry-peer"));
        assert!(config.listen.http.ip().is_unspecified(), "kubelet asks from outside of the pod");
        assert!(config.listen.admin.ip().is_loopback(), "commands come by kubectl");
    }
}

fn numbers(ports: &Option<Vec<NetworkPolicyPort>>) -> Vec<i32> {
    let containers = pod().containers;
    let named = |name: &str| {
        let ports = containers.iter().flat_map(|container| container.ports.iter().flatten());
        let mut ports = ports.filter(|port| port.name.as_deref() == Some(name));
        ports.next().unwrap_or_else(|| panic!("no container has a port {name}")).container_port
    };
    let number = |port: &NetworkPolicyPort| match port.port.as_ref().expect("a port") {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => named(name),
    };
    ports.as_ref().expect("a rule names its ports").iter().map(number).collect()
}

#[test]
fn the_network_policy_lets_in_and_out_what_the_configurations_need_and_nothing_to_the_admin_port() {
    let policy: NetworkPolicy = one("NetworkPolicy");
    let spec = policy.spec.unwrap();
    assert_eq!(spec.policy_types.unwrap(), ["Ingress", "Egress"]);
    let ingress: BTreeSet<i32> = spec.ingress.unwrap().iter().flat_map(|rule| numbers(&rule.ports)).collect();
    let egress: BTreeSet<i32> = spec.egress.unwrap().iter().flat_map(|rule| numbers(&rule.ports)).collect();
    assert_eq!(ingress, BTreeSet::from([2379, 2380, 7443, 7445]));
    assert_eq!(egress, BTreeSet::from([53, 2379, 2380, 7443]));
    for config in configurations().values() {
        assert!(!ingress.contains(&i32::from(config.listen.admin.port())));
        assert!(ingress.contains(&i32::from(config.listen.peer.port())));
        for address in config.send.iter().flat_map(|send| &send.to) {
            let port: i32 = address.rsplit(':').next().unwrap().parse().unwrap();
            assert!(egress.contains(&port), "{address}");
        }
    }
}

#[test]
fn everything_selects_the_pods_of_the_stateful_set_and_names_ports_that_they_have() {
    let set: StatefulSet = one("StatefulSet");
    let spec = set.spec.unwrap();
    let labels = spec.template.metadata.clone().unwrap().labels.unwrap();
    assert_eq!(spec.selector.match_labels.as_ref(), Some(&labels));
    let policy: NetworkPolicy = one("NetworkPolicy");
    assert_eq!(policy.spec.unwrap().pod_selector.unwrap().match_labels.as_ref(), Some(&labels));
    let budget: PodDisruptionBudget = one("PodDisruptionBudget");
    assert_eq!(budget.spec.unwrap().selector.unwrap().match_labels.as_ref(), Some(&labels));
    let services = all::<Service>("Service");
    assert!(services.keys().any(|(_, name)| Some(name) == spec.service_name.as_ref()), "the set's own service");
    let ports: BTreeSet<String> =
        pod().containers.iter().flat_map(|c| c.ports.iter().flatten()).filter_map(|port| port.name.clone()).collect();
    for ((_, name), service) in services {
        let service = service.spec.unwrap();
        assert_eq!(service.selector.as_ref(), Some(&labels), "{name}");
        for port in service.ports.unwrap() {
            let Some(IntOrString::String(target)) = port.target_port else { panic!("{name}: a port by its name") };
            assert!(ports.contains(&target), "{name}: no container has a port {target}");
        }
    }
}

#[test]
fn the_replica_s_etcd_takes_larger_requests_than_the_origin_s_and_its_sidecar_knows() {
    let maps = all::<ConfigMap>("ConfigMap");
    let request_bytes_max = |file: &str| -> u64 {
        let map = &maps[&(file.to_owned(), "etcd".to_owned())];
        map.data.as_ref().unwrap()["MAX_REQUEST_BYTES"].parse().unwrap()
    };
    let (origin, replica) = (request_bytes_max("config-origin.yaml"), request_bytes_max("config-replica.yaml"));
    assert_eq!(replica, origin + 4096);
    for ((file, _), config) in configurations() {
        assert_eq!(config.limits.request_bytes_max as u64, request_bytes_max(&file), "{file}");
    }
}

#[test]
fn each_etcd_is_compacted_either_by_itself_or_by_the_sidecars_beside_it() {
    let args = container("etcd").args.unwrap();
    assert!(args.contains(&"--auto-compaction-retention=$(AUTO_COMPACTION_RETENTION)".to_owned()), "{args:?}");
    let maps = all::<ConfigMap>("ConfigMap");
    for ((file, name), config) in configurations() {
        let retention = &maps[&(file.clone(), "etcd".to_owned())].data.as_ref().unwrap()["AUTO_COMPACTION_RETENTION"];
        assert_eq!(retention == "0", config.compact.is_some(), "{file}: {name}");
    }
}

#[test]
fn no_container_is_root_or_can_become_it() {
    let pod = pod();
    let user = pod.security_context.clone().unwrap();
    assert!(user.run_as_non_root == Some(true) && user.run_as_user > Some(0) && user.fs_group == user.run_as_user);
    assert_eq!(user.fs_group_change_policy.as_deref(), Some("OnRootMismatch"));
    assert_eq!(pod.automount_service_account_token, Some(false));
    for container in pod.containers {
        let security = container.security_context.unwrap();
        assert_eq!(
            (security.allow_privilege_escalation, security.read_only_root_filesystem),
            (Some(false), Some(true))
        );
        assert_eq!(security.capabilities.unwrap().drop, Some(vec!["ALL".to_owned()]));
    }
}
