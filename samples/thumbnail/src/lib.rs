//! `POST /?width=PIXELS` with a PNG or JPEG, back comes a PNG of that width and
//! the same proportions.

#![forbid(unsafe_code)]

use std::io::Cursor;

use image::{DynamicImage, ImageFormat, ImageReader, Limits};
use insula_sdk::{Error, Method, Request, Response, Result, StatusCode};

/// When the query names no width.
const DEFAULT_WIDTH: u32 = 128;
const MAX_WIDTH: u32 = 1024;
/// A picture's file.
const FILE_LIMIT_BYTES: usize = 16 * 1024 * 1024;
/// A picture unpacked: a small file may claim to be enormous.
const PIXELS_LIMIT_BYTES: u64 = 40 * 1024 * 1024;
const MAX_SIDE: u32 = 8192;

#[insula_sdk::main]
async fn handle(mut req: Request) -> Result<Response> {
    if req.method() != Method::POST {
        return Response::text("POST a PNG or JPEG to get a thumbnail\n")
            .with_status(StatusCode::METHOD_NOT_ALLOWED)
            .with_header("allow", "POST");
    }
    let width = width(&req)?;
    let file = req.body_mut().bytes_up_to(FILE_LIMIT_BYTES).await?;
    let picture = decode(&file)?;
    drop(file);
    let small = shrink(&picture, width);
    drop(picture);
    let mut png = Vec::new();
    small.write_to(&mut Cursor::new(&mut png), ImageFormat::Png)?;
    Ok(Response::bytes("image/png", png))
}

fn width(req: &Request) -> Result<u32> {
    let Some(text) = req.query("width") else {
        return Ok(DEFAULT_WIDTH);
    };
    match text.parse() {
        Ok(width @ 1..=MAX_WIDTH) => Ok(width),
        _ => Err(Error::bad_request(format!(
            "width must be a number from 1 to {MAX_WIDTH}"
        ))),
    }
}

fn decode(file: &[u8]) -> Result<DynamicImage> {
    let unreadable = |error: image::ImageError| {
        Error::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "the body is no PNG or JPEG that I can read",
        )
        .with_source(error)
    };
    let mut reader = ImageReader::new(Cursor::new(file))
        .with_guessed_format()
        .map_err(|e| unreadable(e.into()))?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(PIXELS_LIMIT_BYTES);
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    reader.limits(limits);
    reader.decode().map_err(unreadable)
}

/// Never larger than it was.
fn shrink(picture: &DynamicImage, width: u32) -> DynamicImage {
    let width = width.min(picture.width());
    picture.thumbnail(width, MAX_SIDE)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::{ImageFormat, RgbImage};
    use insula_sdk::test::{call, run};
    use insula_sdk::{Request, StatusCode};

    use super::handle;

    fn picture(format: ImageFormat) -> Vec<u8> {
        let mut file = Vec::new();
        let shade = |n: u32| u8::try_from(n % 256).unwrap();
        RgbImage::from_fn(300, 200, |x, y| image::Rgb([shade(x), shade(y), 7]))
            .write_to(&mut Cursor::new(&mut file), format)
            .unwrap();
        file
    }

    #[test]
    fn shrinks_both_formats() {
        for format in [ImageFormat::Png, ImageFormat::Jpeg] {
            run(async {
                let mut response = call(handle, Request::post("/?width=30", picture(format))).await;
                assert_eq!(response.status(), StatusCode::OK);
                assert_eq!(response.headers()["content-type"], "image/png");
                let png = response.body_mut().bytes().await.unwrap();
                let small = image::load_from_memory_with_format(&png, ImageFormat::Png).unwrap();
                assert_eq!((small.width(), small.height()), (30, 20));
            });
        }
    }

    #[test]
    fn refuses_nonsense() {
        run(async {
            let response = call(handle, Request::post("/", "not a picture")).await;
            assert_eq!(response.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
            let response = call(
                handle,
                Request::post("/?width=0", picture(ImageFormat::Png)),
            )
            .await;
            assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        });
    }
}
