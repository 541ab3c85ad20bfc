//! Services and EndpointSlices.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sluice_contract::{Protocol, limits};

use super::fields::{port_name, shared};
use super::{Check, Origin};
use crate::object::{
    AddressFamily, Affinity, Age, Endpoint, EndpointSlice, FORWARDING, Forwarding,
    LoadBalancerAddress, Name, Prefix, Service, ServicePort, SlicePort, TargetPort, TrafficPolicy,
};

/// Says that another proxy serves this Service.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Says that no proxy serves this Service.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Says whose endpoints a slice holds.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Of `ClientIP`, where nothing is said: three hours.
const AFFINITY_SECONDS: i32 = 10_800;

impl Check<'_> {
    pub(super) fn service(&mut self, name: &Name, service: core::Service) -> Service {
        let labels = self.labels(&service.metadata);
        let spec = service.spec.unwrap_or_default();
        let headless = spec.cluster_ip.as_deref() == Some("None");
        let ours = labels.get(PROXY_NAME).is_none() && labels.get(HEADLESS).is_none();
        let served = ours && !headless && spec.type_.as_deref() != Some("ExternalName");
        let mut read = Service {
            name: name.clone(),
            age: self.age(&service.metadata),
            cluster_ips: Vec::new(),
            external_ips: Vec::new(),
            load_balancer: Vec::new(),
            source_ranges: Vec::new(),
            ports: Vec::new(),
            affinity: Affinity::None,
            external_policy: TrafficPolicy::Cluster,
            internal_policy: TrafficPolicy::Cluster,
            forwarding: None,
            health_check_port: None,
            selector: spec.selector.clone().unwrap_or_default(),
            publish_not_ready: spec.publish_not_ready_addresses == Some(true),
        };
        if !served {
            return read;
        }
        read.forwarding = self.forwarding(service.metadata.annotations.as_ref());
        self.service_addresses(&mut read, &spec);
        for (index, it) in spec.ports.iter().flatten().enumerate() {
            let field = format!("spec.ports[{index}]");
            let port = self.service_port(&field, it);
            if let Some(port) = port {
                if read.ports.iter().any(|other| other.name == port.name) {
                    self.error(format!("{field}.name"), "Another port has this name");
                }
                read.ports.push(port);
            }
        }
        self.service_policies(&mut read, &spec);
        self.check_forwarding(&read);
        for (index, it) in service
            .status
            .and_then(|it| it.load_balancer)
            .and_then(|it| it.ingress)
            .into_iter()
            .flatten()
            .enumerate()
        {
            let Some(text) = it.ip else { continue };
            let field = format!("status.loadBalancer.ingress[{index}].ip");
            let proxied = it.ip_mode.as_deref() == Some("Proxy");
            let address = self.host_address(&field, &text);
            read.load_balancer
                .extend(address.map(|address| LoadBalancerAddress { address, proxied }));
        }
        read
    }

    /// How old an object is. What a manifest says of that is its author's word, and does not count.
    fn age(&self, metadata: &ObjectMeta) -> Age {
        if self.origin != Origin::Api {
            return Age::default();
        }
        let created = metadata.creation_timestamp.as_ref();
        Age {
            created: created.map(|it| it.0.as_second()),
            uid: shared(metadata.uid.clone()),
        }
    }

    /// An address that can be somebody's outside this machine. A manifest with another one is refused; of what an API server
    /// has admitted only that address is left out.
    fn host_address(&mut self, field: &str, text: &str) -> Option<IpAddr> {
        let address = self.address(field, text)?;
        let Some(what) = unusable(address) else {
            return Some(address);
        };
        let reason = format!("{address} is not used: it is {what}");
        match self.origin {
            Origin::File(_) => self.error(field, reason),
            Origin::Api => self.warn(field, reason),
        }
        None
    }

    /// A word that nobody knows is told, and the Service used without it.
    fn forwarding(&mut self, annotations: Option<&BTreeMap<String, String>>) -> Option<Forwarding> {
        let text = annotations?.get(FORWARDING)?;
        let modes = [Forwarding::Snat, Forwarding::Dsr];
        let mode = modes.into_iter().find(|mode| mode.word() == text);
        if mode.is_none() {
            self.warn(
                format!("metadata.annotations[{FORWARDING}]"),
                format!("{text:?} is not one of snat, dsr: the node's own setting counts"),
            );
        }
        mode
    }

    fn check_forwarding(&mut self, read: &Service) {
        if read.forwarding != Some(Forwarding::Dsr) {
            return;
        }
        let field = format!("metadata.annotations[{FORWARDING}]");
        if read.external_policy == TrafficPolicy::Local {
            self.warn(
                field,
                "Has no effect: with externalTrafficPolicy Local clients keep their address and their node answers",
            );
        } else if read
            .ports
            .iter()
            .any(|port| port.protocol == Protocol::Sctp)
        {
            self.warn(
                field,
                "Has no effect on SCTP, which needs both directions at one node",
            );
        }
    }

    fn service_addresses(&mut self, read: &mut Service, spec: &core::ServiceSpec) {
        let mut listed = spec.cluster_ips.clone().unwrap_or_default();
        if listed.is_empty() {
            listed.extend(spec.cluster_ip.clone());
        }
        listed.retain(|text| !text.is_empty());
        if listed.is_empty() {
            self.warn(
                "spec.clusterIP",
                "There is none, so the Service has no address of its own",
            );
        }
        for (index, text) in listed.iter().enumerate() {
            let address = self.host_address(&format!("spec.clusterIPs[{index}]"), text);
            read.cluster_ips.extend(address);
        }
        for (index, text) in spec.external_ips.iter().flatten().enumerate() {
            let address = self.host_address(&format!("spec.externalIPs[{index}]"), text);
            read.external_ips.extend(address);
        }
        for (index, text) in spec
            .load_balancer_source_ranges
            .iter()
            .flatten()
            .enumerate()
        {
            let field = format!("spec.loadBalancerSourceRanges[{index}]");
            let range: Option<Prefix> = self.prefix(&field, text.trim());
            read.source_ranges.extend(range);
        }
        for v6 in [false, true] {
            let of_family = read
                .source_ranges
                .iter()
                .filter(|it| it.address().is_ipv6() == v6);
            let lengths: BTreeSet<u8> = of_family.map(Prefix::length).collect();
            if lengths.len() > limits::SOURCE_LENGTHS {
                let most = limits::SOURCE_LENGTHS;
                let reason = format!("More than {most} different prefix lengths in one family");
                self.error("spec.loadBalancerSourceRanges", reason);
            }
        }
    }

    fn service_policies(&mut self, read: &mut Service, spec: &core::ServiceSpec) {
        let external = spec.external_traffic_policy.as_deref();
        read.external_policy = self.traffic_policy("spec.externalTrafficPolicy", external);
        let internal = spec.internal_traffic_policy.as_deref();
        read.internal_policy = self.traffic_policy("spec.internalTrafficPolicy", internal);
        read.affinity = match spec.session_affinity.as_deref() {
            None | Some("" | "None") => Affinity::None,
            Some("ClientIP") => {
                let config = spec.session_affinity_config.as_ref();
                let seconds = config
                    .and_then(|it| it.client_ip.as_ref())
                    .and_then(|it| it.timeout_seconds)
                    .unwrap_or(AFFINITY_SECONDS);
                if !(1..=86_400).contains(&seconds) {
                    let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
                    self.error(field, "Has to be from 1 to 86400");
                }
                Affinity::ClientIp(Duration::from_secs(u64::try_from(seconds).unwrap_or(1)))
            }
            Some(other) => {
                let reason = format!("{other:?} is not one of None, ClientIP");
                self.error("spec.sessionAffinity", reason);
                Affinity::None
            }
        };
        read.health_check_port = spec
            .health_check_node_port
            .filter(|port| *port != 0)
            .and_then(|port| self.port("spec.healthCheckNodePort", port));
    }

    fn traffic_policy(&mut self, field: &str, text: Option<&str>) -> TrafficPolicy {
        match text {
            None | Some("" | "Cluster") => TrafficPolicy::Cluster,
            Some("Local") => TrafficPolicy::Local,
            Some(other) => {
                self.error(field, format!("{other:?} is not one of Cluster, Local"));
                TrafficPolicy::Cluster
            }
        }
    }

    fn service_port(&mut self, field: &str, it: &core::ServicePort) -> Option<ServicePort> {
        let protocol = self.protocol(&format!("{field}.protocol"), it.protocol.as_deref());
        let port = self.port(&format!("{field}.port"), it.port);
        let node_port = it
            .node_port
            .filter(|number| *number != 0)
            .and_then(|number| self.port(&format!("{field}.nodePort"), number));
        let target = match &it.target_port {
            None => port.map(TargetPort::Number),
            Some(IntOrString::Int(0)) => port.map(TargetPort::Number),
            Some(IntOrString::Int(number)) => self
                .port(&format!("{field}.targetPort"), *number)
                .map(TargetPort::Number),
            Some(IntOrString::String(name)) => {
                if let Err(reason) = port_name(name) {
                    self.error(format!("{field}.targetPort"), reason);
                }
                Some(TargetPort::Name(name.clone()))
            }
        };
        Some(ServicePort {
            name: it.name.clone().unwrap_or_default(),
            protocol: protocol?,
            port: port?,
            target: target?,
            node_port,
        })
    }

    /// `None` for slices of names, which nobody can forward to.
    pub(super) fn slice(
        &mut self,
        name: &Name,
        slice: discovery::EndpointSlice,
    ) -> Option<EndpointSlice> {
        let labels = self.labels(&slice.metadata);
        let family = match slice.address_type.as_str() {
            "IPv4" => AddressFamily::V4,
            "IPv6" => AddressFamily::V6,
            "FQDN" => {
                self.warn("addressType", "Names are not forwarded to");
                return None;
            }
            other => {
                self.error(
                    "addressType",
                    format!("{other:?} is not one of IPv4, IPv6, FQDN"),
                );
                return None;
            }
        };
        let mut ports = Vec::new();
        for (index, it) in slice.ports.into_iter().flatten().enumerate() {
            let field = format!("ports[{index}]");
            let protocol = self.protocol(&format!("{field}.protocol"), it.protocol.as_deref());
            let port = it
                .port
                .and_then(|port| self.port(&format!("{field}.port"), port));
            if let (Some(protocol), Some(port)) = (protocol, port) {
                ports.push(SlicePort {
                    name: it.name.unwrap_or_default(),
                    protocol,
                    port,
                });
            }
        }
        let mut endpoints = Vec::new();
        for (index, it) in slice.endpoints.into_iter().flatten().enumerate() {
            endpoints.extend(self.endpoint(&format!("endpoints[{index}]"), family, it));
        }
        Some(EndpointSlice {
            name: name.clone(),
            service: shared(labels.get(SERVICE_NAME).map(str::to_owned)),
            family,
            ports,
            endpoints,
        })
    }

    fn endpoint(
        &mut self,
        field: &str,
        family: AddressFamily,
        it: discovery::Endpoint,
    ) -> Option<Endpoint> {
        let field = format!("{field}.addresses");
        let Some(first) = it.addresses.first() else {
            self.error(field, "Needs one address");
            return None;
        };
        let address = self.host_address(&format!("{field}[0]"), first)?;
        if address.is_ipv4() != (family == AddressFamily::V4) {
            self.error(format!("{field}[0]"), "Not of the slice's addressType");
        }
        let conditions = it.conditions.unwrap_or_default();
        // Where nothing is said an endpoint is ready, and serves if it is ready.
        let ready = conditions.ready.unwrap_or(true);
        let hints = it.hints.unwrap_or_default();
        Some(Endpoint {
            address,
            ready,
            serving: conditions.serving.unwrap_or(ready),
            terminating: conditions.terminating.unwrap_or(false),
            node: shared(it.node_name),
            zone: shared(it.zone),
            zone_hints: hints
                .for_zones
                .into_iter()
                .flatten()
                .map(|it| it.name.into())
                .collect(),
            node_hints: hints
                .for_nodes
                .into_iter()
                .flatten()
                .map(|it| it.name.into())
                .collect(),
        })
    }
}

/// What an address is that no Service and no endpoint can have; the appliance refuses all of these.
fn unusable(address: IpAddr) -> Option<&'static str> {
    let v4 = |at: IpAddr| match at {
        IpAddr::V4(v4) => Some(v4.octets()),
        IpAddr::V6(_) => None,
    };
    let is_link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    match v4(address) {
        _ if address.is_loopback() => Some("a loopback address"),
        _ if is_link_local => Some("a link-local address"),
        _ if address.is_multicast() => Some("a multicast address"),
        _ if address.is_unspecified() => Some("the unspecified address"),
        Some([255, 255, 255, 255]) => Some("the broadcast address"),
        Some([0, ..]) => Some("an address of 0.0.0.0/8"),
        Some([127, ..]) => Some("a loopback address"),
        Some([240..=255, ..]) => Some("an address of 240.0.0.0/4, which is reserved"),
        _ => None,
    }
}
