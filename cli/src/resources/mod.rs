//! The verbs that list, show, set and delete what a host keeps.

mod fields;
pub(crate) mod set;

use anyhow::Result;
use insula_types::VolumeName;
use serde_json::{Map, Value, json};

use crate::args::{
    Format, Look, RollbackArgs, ServiceRef, ServicesVerb, TenantsVerb, TokensVerb, TrafficArgs,
    UsageArgs, VersionsVerb, VolumesVerb,
};
use crate::client::Client;
use crate::output::{self, Field};

/// Pages of a list that are asked for, at most.
const PAGES_MAX: usize = 1000;

pub(crate) async fn tenants(verb: TenantsVerb) -> Result<()> {
    match verb {
        TenantsVerb::List(look) => list(&look, "/v1/tenants", fields::TENANTS).await,
        TenantsVerb::Show { tenant, look } => {
            show(&look, &format!("/v1/tenants/{tenant}"), fields::TENANT).await
        }
        TenantsVerb::Set {
            tenant,
            patch,
            look,
        } => {
            let path = format!("/v1/tenants/{tenant}");
            put(&look, &path, fields::TENANT, |spec| patch.apply(spec)).await
        }
        TenantsVerb::Delete { tenant, connection } => {
            let client = Client::new(&connection)?;
            client.delete(&format!("/v1/tenants/{tenant}")).await?;
            output::note(&format!("deleted tenant {tenant}"));
            Ok(())
        }
    }
}

pub(crate) async fn services(verb: ServicesVerb) -> Result<()> {
    match verb {
        ServicesVerb::List { tenant, look } => {
            let path = format!("/v1/tenants/{tenant}/services");
            list(&look, &path, fields::SERVICES).await
        }
        ServicesVerb::Show { service, look } => show(&look, &service.path(), fields::SERVICE).await,
        ServicesVerb::Set {
            service,
            patch,
            look,
        } => {
            put(&look, &service.path(), fields::SERVICE, |spec| {
                patch.apply(spec)
            })
            .await
        }
        ServicesVerb::Delete {
            service,
            connection,
        } => {
            Client::new(&connection)?.delete(&service.path()).await?;
            output::note(&format!("deleted service {service}"));
            Ok(())
        }
    }
}

pub(crate) async fn volumes(verb: VolumesVerb) -> Result<()> {
    match verb {
        VolumesVerb::List { tenant, look } => {
            let path = format!("/v1/tenants/{tenant}/volumes");
            list(&look, &path, fields::VOLUMES).await
        }
        VolumesVerb::Show { volume, look } => show(&look, &volume.path(), fields::VOLUME).await,
        VolumesVerb::Set {
            volume,
            size,
            inodes,
            kind,
            look,
        } => {
            put(&look, &volume.path(), fields::VOLUME, |mut spec| {
                if let Some(size) = size {
                    spec["size_bytes"] = json!(size);
                }
                if let Some(inodes) = inodes {
                    spec["inodes"] = json!(inodes);
                }
                if let Some(kind) = kind {
                    spec["kind"] = json!(kind);
                }
                Ok(spec)
            })
            .await
        }
        VolumesVerb::Snapshot { volume, name, look } => {
            copy(&look, &format!("{}/snapshot", volume.path()), &name).await
        }
        VolumesVerb::Clone { volume, name, look } => {
            copy(&look, &format!("{}/clone", volume.path()), &name).await
        }
        VolumesVerb::Delete { volume, connection } => {
            Client::new(&connection)?.delete(&volume.path()).await?;
            output::note(&format!("deleted volume {volume}"));
            Ok(())
        }
    }
}

async fn copy(look: &Look, path: &str, name: &VolumeName) -> Result<()> {
    let client = Client::new(&look.connection)?;
    let answer = client.post(path, &json!({"name": name})).await?.json()?;
    output::object(look.output, fields::VOLUME, &answer)
}

pub(crate) async fn versions(verb: VersionsVerb) -> Result<()> {
    let VersionsVerb::List { service, look } = verb;
    let path = format!("{}/versions", service.path());
    list(&look, &path, fields::VERSIONS).await
}

pub(crate) async fn rollback(args: RollbackArgs) -> Result<()> {
    let client = Client::new(&args.look.connection)?;
    let path = format!("{}/rollback", args.service.path());
    client.post(&path, &json!({})).await?;
    show_versions(&client, &args.look, &args.service).await
}

pub(crate) async fn traffic(args: TrafficArgs) -> Result<()> {
    let client = Client::new(&args.look.connection)?;
    let mut shares = Map::new();
    for (version, percent) in &args.shares {
        if shares.insert(version.to_string(), json!(percent)).is_some() {
            return Err(crate::UsageError(format!("version {version} is given twice")).into());
        }
    }
    let path = format!("{}/traffic", args.service.path());
    client.put(&path, &Value::Object(shares), None).await?;
    show_versions(&client, &args.look, &args.service).await
}

async fn show_versions(client: &Client, look: &Look, service: &ServiceRef) -> Result<()> {
    let answer = all(client, &format!("{}/versions", service.path())).await?;
    output::list(look.output, fields::VERSIONS, &answer)
}

pub(crate) async fn usage(args: UsageArgs) -> Result<()> {
    let client = Client::new(&args.look.connection)?;
    let path = format!("/v1/tenants/{}/usage", args.tenant);
    let mut answer = client.get(&path).await?.json()?;
    if args.look.output == Format::Json {
        return output::json(&answer);
    }
    outcomes(&mut answer);
    output::print(&output::description(fields::USAGE, &answer))?;
    let services = answer["services"].as_array_mut();
    let services = services.filter(|services| !services.is_empty());
    if let Some(services) = services {
        services.iter_mut().for_each(outcomes);
        output::print(&format!(
            "\n{}",
            output::table(fields::SERVICE_USAGE, services)
        ))?;
    }
    Ok(())
}

/// Keeps of the outcomes those that happened; people would not find them among the zeros.
fn outcomes(usage: &mut Value) {
    let requests = usage["requests"].as_object().cloned().unwrap_or_default();
    let happened = |(outcome, count): &(String, Value)| outcome != "total" && *count != json!(0);
    let outcomes: Map<String, Value> = requests.into_iter().filter(happened).collect();
    usage["outcomes"] = Value::Object(outcomes);
}

pub(crate) async fn tokens(verb: TokensVerb) -> Result<()> {
    match verb {
        TokensVerb::List(look) => list(&look, "/v1/tokens", fields::TOKENS).await,
        TokensVerb::Create {
            name,
            tenant,
            access,
            ttl_seconds,
            look,
        } => {
            let client = Client::new(&look.connection)?;
            let body = json!({
                "name": name,
                "tenant": tenant,
                "access": access.as_str(),
                "ttl_seconds": ttl_seconds,
            });
            let answer = client.post("/v1/tokens", &body).await?.json()?;
            output::object(look.output, fields::NEW_TOKEN, &answer)
        }
        TokensVerb::Delete { id, connection } => {
            let client = Client::new(&connection)?;
            client.delete(&format!("/v1/tokens/{id}")).await?;
            output::note(&format!("deleted token {id}"));
            Ok(())
        }
    }
}

pub(crate) async fn list(look: &Look, path: &str, fields: &[Field]) -> Result<()> {
    let client = Client::new(&look.connection)?;
    let answer = all(&client, path).await?;
    output::list(look.output, fields, &answer)
}

/// A list with the items of all its pages; `next` is where the one after goes on.
pub(crate) async fn all(client: &Client, path: &str) -> Result<Value> {
    let mut answer = client.get(path).await?.json()?;
    for _ in 0..PAGES_MAX {
        let Some(next) = answer["next"].as_str() else {
            break;
        };
        let page = client
            .get(&format!("{path}?continue={next}"))
            .await?
            .json()?;
        let items = page["items"].as_array().cloned().unwrap_or_default();
        if let Some(all) = answer["items"].as_array_mut() {
            all.extend(items);
        }
        answer["next"] = page["next"].clone();
    }
    Ok(answer)
}

pub(crate) async fn show(look: &Look, path: &str, fields: &[Field]) -> Result<()> {
    let client = Client::new(&look.connection)?;
    let answer = client.get(path).await?.json()?;
    output::object(look.output, fields, &answer)
}

/// Reads what is there, applies the change, writes it back unless somebody else was faster. A
/// document that was read can be written: the host passes over the fields that it added.
pub(crate) async fn put(
    look: &Look,
    path: &str,
    fields: &[Field],
    change: impl FnOnce(Value) -> Result<Value>,
) -> Result<()> {
    let client = Client::new(&look.connection)?;
    let (spec, etag) = match client.find(path).await? {
        Some(answer) => (answer.json()?, answer.etag()),
        None => (json!({}), None),
    };
    let spec = change(spec)?;
    let answer = client.put(path, &spec, etag).await?.json()?;
    output::object(look.output, fields, &answer)
}
