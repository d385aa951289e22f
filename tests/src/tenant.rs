//! Tenants and their services.

use serde_json::{Value, json};

use crate::guests;
use crate::host::TestHost;
use crate::http::{Answer, Connection, Request};

/// A tenant that is to be created.
#[derive(Debug)]
#[must_use]
pub struct TenantPlan {
    host: TestHost,
    name: String,
    spec: Value,
}

impl TenantPlan {
    pub(crate) fn new(host: TestHost, name: &str) -> Self {
        Self {
            host,
            name: name.to_owned(),
            spec: json!({}),
        }
    }

    /// Its whole envelope.
    pub fn spec(mut self, spec: Value) -> Self {
        self.spec = spec;
        self
    }

    /// Its share of the CPU against siblings.
    pub fn shares(mut self, shares: u64) -> Self {
        self.spec["cpu"] = json!({"shares": shares});
        self
    }

    /// The memory of all its guests together.
    pub fn memory(mut self, limit: &str) -> Self {
        self.spec["memory"] = json!({"limit": limit});
        self
    }

    /// Creates it.
    pub fn create(self) -> Tenant {
        self.host
            .admin()
            .put(&format!("/v1/tenants/{}", self.name), &self.spec);
        Tenant {
            host: self.host,
            name: self.name,
        }
    }
}

/// A tenant.
#[derive(Debug, Clone)]
pub struct Tenant {
    host: TestHost,
    name: String,
}

impl Tenant {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A service that is to be deployed.
    pub fn service(&self, name: &str) -> ServicePlan {
        ServicePlan {
            tenant: self.clone(),
            name: name.to_owned(),
            spec: json!({}),
        }
    }

    /// A service of a sample, under the sample's name.
    ///
    /// # Panics
    /// When it cannot be deployed.
    #[must_use]
    pub fn deploy(&self, sample: &str) -> Service {
        self.service(sample).deploy(sample)
    }

    /// Deletes it.
    pub fn delete(&self) {
        self.host
            .admin()
            .delete(&format!("/v1/tenants/{}", self.name));
    }
}

/// A service that is to be deployed.
#[derive(Debug)]
#[must_use]
pub struct ServicePlan {
    tenant: Tenant,
    name: String,
    spec: Value,
}

impl ServicePlan {
    /// Its whole document.
    pub fn spec(mut self, spec: Value) -> Self {
        self.spec = spec;
        self
    }

    /// Limits on one request.
    pub fn limits(mut self, limits: Value) -> Self {
        self.spec["limits"] = limits;
        self
    }

    /// Answers carry `insula-usage`.
    pub fn usage_header(mut self) -> Self {
        self.spec["usage_header"] = json!(true);
        self
    }

    /// One variable of its environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.spec["env"][name] = json!(value);
        self
    }

    /// Creates it, without a version.
    #[must_use]
    pub fn create(self) -> Service {
        let service = Service {
            tenant: self.tenant,
            name: self.name,
        };
        service.tenant.host.admin().put(&service.path(), &self.spec);
        service
    }

    /// Creates it and deploys a sample.
    ///
    /// # Panics
    /// When the upload is refused.
    #[must_use]
    pub fn deploy(self, sample: &str) -> Service {
        self.deploy_bytes(guests::bytes(sample))
    }

    /// Creates it and deploys a component.
    ///
    /// # Panics
    /// When the upload is refused.
    #[must_use]
    pub fn deploy_bytes(self, component: Vec<u8>) -> Service {
        let service = self.create();
        let answer = service.upload(component);
        assert_eq!(answer.status, 201, "{}", answer.text());
        assert_eq!(answer.json()["active"], true, "{}", answer.text());
        service
    }
}

/// A service.
#[derive(Debug, Clone)]
pub struct Service {
    tenant: Tenant,
    name: String,
}

impl Service {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its tenant.
    #[must_use]
    pub fn tenant(&self) -> &str {
        &self.tenant.name
    }

    /// Its path in the admin API.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/v1/tenants/{}/services/{}", self.tenant.name, self.name)
    }

    /// The name that it answers to.
    #[must_use]
    pub fn host_name(&self) -> String {
        format!("{}.{}.localhost", self.name, self.tenant.name)
    }

    /// Uploads a version.
    #[must_use]
    pub fn upload(&self, component: Vec<u8>) -> Answer {
        let path = format!("{}/versions", self.path());
        self.tenant.host.admin().upload(&path, component).send()
    }

    /// Deletes it.
    pub fn delete(&self) {
        self.tenant.host.admin().delete(&self.path());
    }

    /// A request to it.
    pub fn request(&self, method: &str, target: &str) -> Request {
        self.tenant.host.request(&self.host_name(), method, target)
    }

    /// A GET.
    pub fn get(&self, target: &str) -> Request {
        self.request("GET", target)
    }

    /// A POST with a body.
    pub fn post(&self, target: &str, body: impl Into<Vec<u8>>) -> Request {
        self.request("POST", target).body(body)
    }

    /// A connection to the ingress.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn connect(&self) -> Connection {
        Connection::open(self.tenant.host.ingress()).expect("a connection to the ingress")
    }

    /// Its log, a JSON document per line.
    ///
    /// # Panics
    /// When it is refused or a line is no JSON.
    #[must_use]
    pub fn log(&self) -> Vec<Value> {
        let path = format!("{}/logs", self.path());
        let answer = self.tenant.host.admin().request("GET", &path).send();
        assert_eq!(answer.status, 200, "{}", answer.text());
        let text = answer.text();
        let line = |line| serde_json::from_str(line).unwrap_or_else(|_| panic!("a line: {line:?}"));
        text.lines().map(line).collect()
    }
}
