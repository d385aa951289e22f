//! The attribute macro of `insula-sdk`; use it from there, where it is
//! documented. It must never depend on anything: every guest compiles it.

#![forbid(unsafe_code)]

use proc_macro::{Span, TokenStream, TokenTree};

/// Makes an `async fn` the handler of the component. See `insula_sdk::main`.
#[proc_macro_attribute]
pub fn main(arguments: TokenStream, item: TokenStream) -> TokenStream {
    if let Some(first) = arguments.into_iter().next() {
        return complain(first.span(), "insula_sdk::main takes no arguments");
    }
    let name = match function_name(item.clone()) {
        Ok(name) => name,
        Err((span, message)) => return complain(span, message),
    };
    let export = parse("::insula_sdk::__export!").into_iter().chain([
        TokenTree::Group(proc_macro::Group::new(
            proc_macro::Delimiter::Parenthesis,
            TokenStream::from(name),
        )),
        TokenTree::Punct(proc_macro::Punct::new(';', proc_macro::Spacing::Alone)),
    ]);
    item.into_iter().chain(export).collect()
}

/// The name of the function, if the item is an async one.
fn function_name(item: TokenStream) -> Result<TokenTree, (Span, &'static str)> {
    const NOT_A_FUNCTION: &str = "insula_sdk::main belongs on an async fn";
    let mut asynchronous = false;
    let mut tokens = item.into_iter();
    while let Some(token) = tokens.next() {
        let TokenTree::Ident(word) = &token else {
            continue;
        };
        match word.to_string().as_str() {
            "async" => asynchronous = true,
            "fn" if asynchronous => {
                return tokens.next().ok_or((token.span(), NOT_A_FUNCTION));
            }
            "fn" => return Err((token.span(), "the handler must be an async fn")),
            "struct" | "enum" | "mod" | "impl" | "trait" | "const" | "static" => {
                return Err((token.span(), NOT_A_FUNCTION));
            }
            _ => {}
        }
    }
    Err((Span::call_site(), NOT_A_FUNCTION))
}

fn complain(span: Span, message: &str) -> TokenStream {
    parse(&format!("compile_error!({message:?});"))
        .into_iter()
        .map(|mut token| {
            token.set_span(span);
            token
        })
        .collect()
}

/// Parses text that is written above, so that it cannot fail.
fn parse(text: &str) -> TokenStream {
    text.parse().unwrap_or_default()
}
