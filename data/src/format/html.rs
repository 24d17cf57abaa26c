//! HTML: a row a file, the text that a reader of the page would see, blocks on lines of their own. Scripts, styles and
//! the head but for its title are left out.

use std::{cell::RefCell, io::Read};

use html5ever::{
    tendril::StrTendril,
    tokenizer::{
        BufferQueue, Tag, TagKind, Token, TokenSink, TokenSinkResult, Tokenizer, TokenizerOpts, states::RawKind,
    },
};

use crate::{
    DataError,
    reading::{LONGEST_ROW, Reading},
    rows::Fields,
};

pub(super) fn read(reader: &mut impl Read, reading: &mut Reading) -> Result<(), DataError> {
    let bytes = reading.whole(reader, LONGEST_ROW)?;
    if bytes.contains(&0) {
        return Err(reading.user("not HTML: the file is binary"));
    }
    let page = std::str::from_utf8(&bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
        reading.user_at(line as u64, format!("not UTF-8 (byte {} of the file)", error.valid_up_to()))
    })?;
    let text = text_of(page);
    if text.is_empty() {
        return Err(reading.user("no text in the page"));
    }
    reading.row(1, Fields { text: &text, ..Fields::default() })
}

/// Text of a page: runs of whitespace are one space, as in a browser.
fn text_of(page: &str) -> String {
    let input = BufferQueue::default();
    input.push_back(StrTendril::from(page));
    let tokenizer = Tokenizer::new(Sink::default(), TokenizerOpts::default());
    let _ = tokenizer.feed(&input);
    tokenizer.end();
    let text = tokenizer.sink.0.into_inner().text;
    text.trim_end().to_owned()
}

#[derive(Default)]
struct Sink(RefCell<Writer>);

#[derive(Default)]
struct Writer {
    text: String,
    /// Elements that are open and whose content is not shown, innermost last.
    hidden: Vec<String>,
    /// Inside `pre`, where line breaks are shown.
    preformatted: usize,
}

impl TokenSink for Sink {
    type Handle = ();

    fn process_token(&self, token: Token, _line: u64) -> TokenSinkResult<()> {
        let mut writer = self.0.borrow_mut();
        match token {
            Token::CharacterTokens(text) if writer.hidden.is_empty() => writer.write(&text),
            Token::TagToken(tag) => return writer.tag(&tag),
            _ => {}
        }
        TokenSinkResult::Continue
    }
}

impl Writer {
    fn write(&mut self, text: &str) {
        for letter in text.chars() {
            if !letter.is_whitespace() || (self.preformatted > 0 && !self.text.is_empty()) {
                self.text.push(letter);
            } else if !self.text.is_empty() && !self.text.ends_with(char::is_whitespace) {
                self.text.push(' ');
            }
        }
    }

    fn tag(&mut self, tag: &Tag) -> TokenSinkResult<()> {
        let name = &*tag.name;
        let opens = tag.kind == TagKind::StartTag;
        // What is not shown, or belongs to the page's workings.
        let is_hidden =
            matches!(name, "script" | "style" | "noscript" | "template" | "iframe" | "svg" | "noembed" | "noframes");
        if is_hidden && opens && !(tag.self_closing && name == "svg") {
            self.hidden.push(name.to_owned());
        } else if is_hidden && let Some(place) = self.hidden.iter().rposition(|open| open == name) {
            self.hidden.truncate(place);
        } else if self.hidden.is_empty() {
            self.lay_out(name, opens);
        }
        // The tokenizer has no elements: the rules for their content are the tree builder's.
        match name {
            "script" if opens => TokenSinkResult::RawData(RawKind::ScriptData),
            "style" | "iframe" | "noembed" | "noframes" if opens => TokenSinkResult::RawData(RawKind::Rawtext),
            "title" | "textarea" if opens => TokenSinkResult::RawData(RawKind::Rcdata),
            _ => TokenSinkResult::Continue,
        }
    }

    fn lay_out(&mut self, name: &str, opens: bool) {
        match name {
            "pre" => {
                self.preformatted = if opens { self.preformatted + 1 } else { self.preformatted.saturating_sub(1) };
                self.break_line();
            }
            "td" | "th" if opens => self.write(" "),
            "br" | "hr" | "address" | "article" | "aside" | "blockquote" | "body" | "center" | "dd" | "details"
            | "dialog" | "div" | "dl" | "dt" | "fieldset" | "figcaption" | "figure" | "footer" | "form" | "h1"
            | "h2" | "h3" | "h4" | "h5" | "h6" | "head" | "header" | "html" | "legend" | "li" | "main" | "menu"
            | "nav" | "ol" | "option" | "p" | "section" | "select" | "summary" | "table" | "tbody" | "tfoot"
            | "thead" | "title" | "tr" | "ul" => self.break_line(),
            _ => {}
        }
    }

    fn break_line(&mut self) {
        if self.text.ends_with(' ') {
            self.text.pop();
        }
        if !self.text.is_empty() && !self.text.ends_with('\n') {
            self.text.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_the_text_that_a_reader_sees() {
        let page = "<!DOCTYPE html><html><head><title>A &amp; B</title><style>p { color: red }</style>\
             <script>if (a < b) document.write('<p>no</p>')</script></head>\n<body><h1>Tea\n  time</h1><p>One<br>two <b>bold</b>,\
             &nbsp;three &#8364;<!-- a remark --><ul><li>first<li>second</ul><noscript>Turn it on</noscript>\
             <table><tr><td>1</td><td>2</td></tr></table><pre>a\n  b</pre><template><p>later</p></template>end";
        assert_eq!(text_of(page), "A & B\nTea time\nOne\ntwo bold, three €\nfirst\nsecond\n1 2\na\n  b\nend");
        assert_eq!(text_of("just text"), "just text");
        assert_eq!(text_of("<p>a</p><script>never closed"), "a");
        assert_eq!(text_of(""), "");
    }
}
