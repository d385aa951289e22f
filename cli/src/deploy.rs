//! `insula deploy`: from a component to an answer.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use insula_host::config::COMPONENT_MAX;
use serde_json::{Value, json};

use crate::args::{DeployArgs, Format, ServiceRef};
use crate::client::{Client, ClientError};
use crate::output;
use crate::project;

/// From the upload to the switch; the answer to the upload comes after it on an idle host.
const SERVES_WITHIN: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// Whether an uploaded version takes the requests over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    AtOnce,
    Dark,
}

pub(crate) async fn run(args: DeployArgs) -> Result<()> {
    let component = component(&args.source).await?;
    let client = Client::new(&args.look.connection)?;
    let service = ServiceRef {
        tenant: args.tenant,
        service: args.service,
    };
    if args.create {
        ensure_tenant(&client, &service).await?;
    }
    ensure_service(&client, &service).await?;
    let activation = if args.dark {
        Activation::Dark
    } else {
        Activation::AtOnce
    };
    let deployed = upload(&client, &service, component, activation).await?;
    match args.look.output {
        Format::Json => output::json(&deployed),
        Format::Table => print(&deployed, &service),
    }
}

/// Tells what serves now, and where.
pub(crate) fn print(deployed: &Value, service: &ServiceRef) -> Result<()> {
    let text = |key: &str| {
        let value = &deployed[key];
        value
            .as_str()
            .map_or_else(|| value.to_string(), output::plain)
    };
    let dark = if deployed["active"] == json!(false) {
        " (dark)"
    } else {
        ""
    };
    let version = text("version");
    output::line(&format!(
        "{service} version {version}{dark} {}",
        text("digest")
    ))?;
    output::line(&text("url"))?;
    Ok(())
}

async fn component(source: &Path) -> Result<Bytes> {
    let path = if source.is_dir() {
        project::build_aside(source.to_owned()).await?.path
    } else {
        source.to_owned()
    };
    read_component(&path)
}

/// Reads a component that is not larger than any host takes.
pub(crate) fn read_component(path: &Path) -> Result<Bytes> {
    let shown = || path.display().to_string();
    let size = std::fs::metadata(path).with_context(shown)?.len();
    if size > COMPONENT_MAX.get() {
        let max = output::bytes_text(COMPONENT_MAX.get());
        bail!(
            "{} is larger than {max}, the most that a host takes",
            shown()
        );
    }
    Ok(std::fs::read(path).with_context(shown)?.into())
}

/// Creates the tenant if there is none.
pub(crate) async fn ensure_tenant(client: &Client, service: &ServiceRef) -> Result<()> {
    let path = format!("/v1/tenants/{}", service.tenant);
    if client.find(&path).await?.is_none() {
        client.put(&path, &json!({}), None).await?;
        output::note(&format!("created tenant {}", service.tenant));
    }
    Ok(())
}

/// Creates the service if there is none. Its tenant must be there.
pub(crate) async fn ensure_service(client: &Client, service: &ServiceRef) -> Result<()> {
    let path = service.path();
    if client.find(&path).await?.is_some() {
        return Ok(());
    }
    match client.put(&path, &json!({}), None).await {
        Ok(_) => {
            output::note(&format!("created service {service}"));
            Ok(())
        }
        Err(error) if error.is_not_found() => bail!(
            "tenant {tenant} is missing\n\
             create it with `insula tenants set {tenant}`, or add --create",
            tenant = service.tenant
        ),
        Err(error) => Err(error.into()),
    }
}

/// Uploads a component and, unless it is to stay dark, waits until requests reach it. The answer
/// is that of the host: version, digest, size, URL, whether it is active.
pub(crate) async fn upload(
    client: &Client,
    service: &ServiceRef,
    component: Bytes,
    activation: Activation,
) -> Result<Value> {
    let query = match activation {
        Activation::AtOnce => "",
        Activation::Dark => "?activate=false",
    };
    let path = format!("{}/versions{query}", service.path());
    let uploaded = client.post_component(&path, component);
    let uploaded = output::with_time("uploading and compiling", uploaded);
    let mut answer = uploaded.await?.json()?;
    if activation == Activation::Dark {
        return Ok(answer);
    }
    let started = Instant::now();
    while answer["active"] != json!(true) {
        if started.elapsed() > SERVES_WITHIN {
            bail!(
                "version {} of {service} was stored and does not serve yet; \
                 see `insula versions list {service}`",
                answer["version"]
            );
        }
        tokio::time::sleep(POLL).await;
        answer["active"] = json!(is_active(client, service, &answer["version"]).await?);
    }
    Ok(answer)
}

async fn is_active(
    client: &Client,
    service: &ServiceRef,
    version: &Value,
) -> Result<bool, ClientError> {
    let list = client
        .get(&format!("{}/versions", service.path()))
        .await?
        .json()?;
    let items = list["items"].as_array();
    let found = items.and_then(|items| items.iter().find(|item| item["version"] == *version));
    Ok(found.is_some_and(|item| item["active"] == json!(true)))
}
