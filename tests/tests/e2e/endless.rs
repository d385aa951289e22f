//! Guests that never end by themselves, or take of one thing without end, in ways that no language's
//! compiler offers. What becomes of each is a case of `hostile`.

use crate::handmade::{Parts, answering, component};

pub(crate) fn start() -> Vec<u8> {
    answering(
        1,
        "(func $begin (loop $more (br $more))) (start $begin) (func $status (result i32) i32.const 200)",
    )
}

pub(crate) fn start_recursion() -> Vec<u8> {
    answering(
        1,
        "(func $begin (call $begin)) (start $begin) (func $status (result i32) i32.const 200)",
    )
}

/// Two functions that give way to each other and need no stack for it.
pub(crate) fn tail_calls() -> Vec<u8> {
    answering(
        1,
        "(func $ping (return_call $pong)) (func $pong (return_call $ping))
         (func $status (result i32) (call $ping) (i32.const 200))",
    )
}

/// Grows a table, and goes on where it cannot.
pub(crate) fn table_grow() -> Vec<u8> {
    answering(
        1,
        "(table $table 1 funcref)
         (func $status (result i32)
           (loop $more
             (drop (table.grow $table (ref.null func) (i32.const 1000)))
             (br $more))
           (unreachable))",
    )
}

/// Grows two memories in turn, and goes on where it cannot.
pub(crate) fn two_memories() -> Vec<u8> {
    answering(
        1,
        "(memory $other 1)
         (func $status (result i32)
           (loop $more
             (drop (memory.grow $memory (i32.const 1)))
             (drop (memory.grow $other (i32.const 1)))
             (br $more))
           (unreachable))",
    )
}

/// Makes room for a text that the host wants to hand over, without end.
pub(crate) fn realloc() -> Vec<u8> {
    component(&Parts {
        pages: 1,
        room: r#"(func (export "realloc") (param i32 i32 i32 i32) (result i32)
                   (loop $more (br $more)) (unreachable))"#,
        before: r#"(core func $path
                     (canon lower (func $types "[method]incoming-request.path-with-query")
                       (memory $room "memory") (realloc (func $room "realloc"))))"#,
        with: r#"(with "own" (instance (export "path" (func $path))))"#,
        imports: r#"(import "own" "path" (func $path (param i32 i32)))"#,
        main: "(func $status (result i32)
                 (call $path (global.get $asked) (i32.const 0)) (i32.const 200))",
        ..Parts::default()
    })
}

/// Answers well, and never comes back from what it does after that.
pub(crate) fn post_return() -> Vec<u8> {
    component(&Parts {
        pages: 1,
        main: r#"(func (export "end") (loop $more (br $more)))
                 (func $status (result i32) i32.const 200)"#,
        lifted: r#"(post-return (func $main "end"))"#,
        ..Parts::default()
    })
}

/// A resource of its own: its destructor has no end, or it has no end of them.
fn resource(main: &str) -> Vec<u8> {
    component(&Parts {
        pages: 1,
        before: r#"(core module $last
                     (func (export "end") (param i32) (loop $more (br $more))))
                   (core instance $last (instantiate $last))
                   (type $own (resource (rep i32) (dtor (func $last "end"))))
                   (core func $new (canon resource.new $own))
                   (core func $drop (canon resource.drop $own))"#,
        with: r#"(with "own" (instance (export "new" (func $new)) (export "drop" (func $drop))))"#,
        imports: r#"(import "own" "new" (func $new (param i32) (result i32)))
                    (import "own" "drop" (func $drop (param i32)))"#,
        main,
        ..Parts::default()
    })
}

pub(crate) fn destructor() -> Vec<u8> {
    resource("(func $status (result i32) (call $drop (call $new (i32.const 1))) (i32.const 200))")
}

pub(crate) fn handles() -> Vec<u8> {
    resource(
        "(func $status (result i32)
           (loop $more (drop (call $new (i32.const 1))) (br $more)) (unreachable))",
    )
}
