//! Images: kernels, initial ramdisks and disks, by name.

use std::rc::Rc;
use std::time::Duration;

use http::StatusCode;
use http::header::LOCATION;

use crate::control::changes::optional;
use crate::control::http_types::{Call, Reply, list};
use crate::control::problem::{Answer, Code, Problem};
use crate::control::{Control, documents, upload};
use crate::state::Put;
use crate::state::blobs::Kind;
use crate::state::machines::PinnedImage;

/// Largest image: a disk of a machine of some size.
pub(crate) const IMAGE_MAX_BYTES: u64 = 64 << 30;
/// Longest time for a whole upload.
const UPLOAD_TOTAL: Duration = Duration::from_secs(4 * 3_600);

pub(crate) async fn index(control: Rc<Control>, call: Call) -> Answer {
    let page = call.page()?;
    let images = control.store(move |store| store.images(&page)).await?;
    let items = images.items.iter().map(documents::image).collect();
    Ok(list(items, images.next))
}

pub(crate) async fn get(control: Rc<Control>, call: Call) -> Answer {
    let name = call.image()?;
    let image = control.store(move |store| store.image(&name)).await?;
    Ok(Reply::ok(&documents::image(&image)).etag(image.generation))
}

pub(crate) async fn put(control: Rc<Control>, mut call: Call) -> Answer {
    let name = call.image()?;
    let precondition = call.precondition()?;
    let actor = call.actor()?;
    call.expect_type("application/octet-stream")?;
    let file = upload::receive(&control, &mut call, IMAGE_MAX_BYTES, UPLOAD_TOTAL).await?;
    if file.size_bytes() == 0 {
        return Err(Problem::new(Code::InvalidImage, "an image is not empty"));
    }
    let (digest, size_bytes) = (file.digest(), file.size_bytes());
    let file = control
        .files
        .run(move |_| file.sync().map(|()| file))
        .await??;
    let _mutation = control.mutation.lock().await;
    control
        .files
        .run(move |files| files.place(Kind::Component, &digest, file))
        .await??;
    let pinned = PinnedImage { digest, size_bytes };
    let put = control
        .change(move |store, now| {
            let before = optional(store.image(&name))?;
            let put = store.put_image(&name, pinned, precondition, now)?;
            let before = before.as_ref().map(documents::image);
            let after = Some(documents::image(put.0.record()));
            let audit = put.0.is_change();
            let audit = audit.then(|| actor.image(put.0.record(), before, after));
            Ok((put, audit))
        })
        .await;
    let (put, unreferenced) = match put {
        Ok(put) => put,
        Err(problem) => {
            control.remove_unreferenced(digest).await;
            return Err(problem);
        }
    };
    control.remove_files(unreferenced).await;
    let (image, document) = (put.record(), documents::image(put.record()));
    match &put {
        Put::Created(image) => control.events.image("image.created", image),
        Put::Changed(image) => control.events.image("image.updated", image),
        Put::Unchanged(_) => {}
    }
    let reply = match &put {
        Put::Created(_) => Reply::json(StatusCode::CREATED, &document).header(LOCATION, &call.path),
        Put::Changed(_) | Put::Unchanged(_) => Reply::ok(&document),
    };
    Ok(reply.etag(image.generation))
}

pub(crate) async fn delete(control: Rc<Control>, call: Call) -> Answer {
    let name = call.image()?;
    let precondition = call.precondition()?;
    let actor = call.actor()?;
    let _mutation = control.mutation.lock().await;
    let deleted = control
        .change(move |store, _| {
            let deleted = store.delete_image(&name, precondition)?;
            let before = documents::image(&deleted.record);
            let audit = actor.image(&deleted.record, Some(before), None);
            Ok((deleted, Some(audit)))
        })
        .await?;
    control.remove_files(deleted.unreferenced).await;
    control.events.image("image.deleted", &deleted.record);
    Ok(Reply::no_content())
}
