"""The chat page in a real Chromium, against `base-tiny` behind the server that `tafkir serve` runs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tafkir.serve.app import build_app
from tafkir.serve.options import ServerOptions
from tests.export.browser import Browser
from tests.serve.conftest import Server, start

KEY = "right-key"
QUESTION = "Sara sold 48 clips in April, and half as many in May. How many clips did she sell altogether?"
OTHER = "A baker has 12 trays with 9 rolls each and sells 75 rolls. How many rolls are left?"
PLACES = 63


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    """One sequence at a time, few places, a key."""
    options = ServerOptions(api_keys=(KEY,))
    app = build_app("base-tiny", max_batch=1, max_queue=PLACES, num_threads=1, speculate="ngram", options=options)
    app.state.worker.engine.speculation.meter = None  # it drafts from the first step on
    server, uvicorn_server, thread = start(app, options)
    yield server
    uvicorn_server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser(guarded: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile"), timeout_s=60) as browser:
        browser.resize(1200, 900)
        visit(browser, guarded.url)
        yield browser


def visit(browser: Browser, address: str) -> None:
    browser.open(address)
    until(browser, "document.readyState === 'complete' && typeof drawText === 'function'")


def until(browser: Browser, condition: str) -> None:
    """Wait in the page."""
    found = browser.run(
        "new Promise(ok => { const end = performance.now() + 40000; const look = () => { let is = false;"
        f"try {{ is = {condition}; }} catch {{}}"
        " if (is || performance.now() > end) ok(Boolean(is)); else setTimeout(look, 15); }; look(); })"
    )
    assert found, (condition, browser.run("document.body.innerText"), browser.console)


def give_key(browser: Browser, key: str) -> None:
    until(browser, "$('key').open")
    browser.run(f"$('key-value').value = {key!r}; $('key-form').requestSubmit($('key-form').querySelector('.strong'))")


RESET = """(() => {
  leave();
  for (const dialog of document.querySelectorAll('dialog[open]')) dialog.close();
  localStorage.clear();
  Object.assign(settings, DEFAULTS);
  showTheme();
  open(talks.fresh());
  speak();
})()"""


@pytest.fixture
def page(browser: Browser, guarded: Server) -> Browser:
    """The page as somebody finds it who comes for the first time, with a key."""
    if browser.run("model === null"):
        browser.run(f"sessionStorage.setItem('tafkir-key', {KEY!r})")
        visit(browser, guarded.url)
        until(browser, "model !== null")
    browser.run(RESET)
    browser.console.clear()
    return browser


def turns(browser: Browser) -> list[dict[str, Any]]:
    """Of the newest conversation that the page has kept."""
    found: list[dict[str, Any]] = json.loads(browser.run("JSON.stringify(talks.all()[0].turns)"))
    return found


def answer_to(server: Server, question: str, **more: Any) -> dict[str, Any]:
    """The server's own answer, greedy where nothing else is said; its text, thoughts and end."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, **more}
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    choice = answer.json()["choices"][0]
    return {
        "content": choice["message"]["content"],
        "reasoning": choice["message"].get("reasoning_content", ""),
        "end": choice["finish_reason"],
    }


def type_in(browser: Browser, text: str) -> None:
    browser.call("Input.insertText", text=text)


DONE = "!running && document.querySelectorAll('.facts').length > 0"


@pytest.mark.browser
def test_a_conversation(browser: Browser, guarded: Server) -> None:
    give_key(browser, "wrong-key")
    until(browser, "$('key').open && $('key-why').textContent === WORDS.en.keyWrong")
    give_key(browser, KEY)
    until(browser, "$('model').textContent.startsWith('base-tiny · 2.9M parameters')")

    # Keyboard alone: the box has the focus, Shift+Enter breaks the line, Enter sends.
    browser.run("$('question').focus()")
    type_in(browser, QUESTION)
    browser.press("Enter", shift=True)
    assert browser.run("$('question').value").endswith("\n")
    browser.press("Enter")
    until(browser, DONE)
    assert browser.run("document.querySelector('.body .boxed').textContent") == "72"
    question, answer = turns(browser)
    assert (question["content"], answer["content"], answer["end"]) == (QUESTION, "\\boxed{72}", "stop")
    assert "48/2=24" in answer["reasoning"] and answer["timings"]["draft_n"] > 0
    thought = "document.querySelector('.thought')"
    assert browser.run(f"{thought}.open") is False
    count = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert f"{count} tokens" in browser.run(f"{thought}.innerText")
    browser.run(f"{thought}.querySelector('summary').click()")
    until(browser, f"{thought}.querySelector('.body').innerText.includes('48/2=24')")
    facts = browser.run("document.querySelector('.facts').textContent")
    for part in (f"{answer['usage']['completion_tokens']} tokens", "tokens/s", "first token after", "of drafts kept"):
        assert part in facts
    assert browser.run("$('status').textContent").strip() == "72", "what a screen reader says at the end"

    # Another answer takes the place of the first; an edited question that of the question.
    browser.run("document.querySelector('.assistant [aria-label=\"Answer again\"]').click()")
    until(browser, "running")
    until(browser, DONE)
    assert [turn["content"] for turn in turns(browser)] == [QUESTION, "\\boxed{72}"]
    browser.run("document.querySelector('.user [aria-label=Edit]').click()")
    assert browser.run("document.activeElement.value") == QUESTION
    browser.run("document.activeElement.select()")
    type_in(browser, OTHER)
    browser.press("Enter")
    until(browser, "running")
    until(browser, DONE)
    expected = answer_to(guarded, OTHER)
    assert [turn["content"] for turn in turns(browser)] == [OTHER, expected["content"]]

    # It is still there after a reload, and gone after it was deleted, until that is taken back.
    visit(browser, guarded.url)
    browser.run("$('show-talks').click(); document.querySelector('.talks .open').click()")
    boxed = browser.run("document.querySelector('.assistant > .body .boxed').textContent")
    assert f"\\boxed{{{boxed}}}" == expected["content"]
    exported = browser.run("talks.markdown(talk, words)")
    assert exported.startswith(f"# {OTHER[:80]}\n") and exported.endswith(f"\n{expected['content']}\n")
    assert all(f"> {line}\n" in exported for line in expected["reasoning"].strip().split("\n"))
    browser.run("$('show-talks').click(); document.querySelector('.talks [aria-label=Delete]').click()")
    assert browser.run("talks.all().length === 0 && !$('notice').hidden")
    browser.run("$('notice').querySelector('button').click()")
    assert browser.run("talks.all().length") == 1
    assert {httpx.URL(url).host for url in browser.requests if url.startswith("http")} == {"127.0.0.1"}
    assert [line for line in browser.console if "401" not in line] == []


@pytest.mark.browser
def test_parameters_reach_the_model(page: Browser, guarded: Server) -> None:
    def choose(**values: Any) -> None:
        for id, value in values.items():
            page.run(f"$('{id}').value = {json.dumps(value)}; $('{id}').dispatchEvent(new Event('input'))")

    choose(temperature=1.5, top_p=0.9, seed=11, max_tokens=20, system="Be brief.")
    page.run(f"ask({QUESTION!r})")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    # The server's own answer to the same request is the oracle.
    expected = answer_to(guarded, "", messages=messages, temperature=1.5, top_p=0.9, seed=11, max_tokens=20)
    assert {name: turns(page)[1][name] for name in expected} == expected
    choose(thinking="off", budget=3, seed="", max_tokens="")
    page.run("$('history').click()")
    sent = page.run("requestOf([...talk.turns, {role: 'user', content: 'more'}])")
    assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert {key: sent.get(key) for key in ("enable_thinking", "max_thinking_tokens", "seed", "max_tokens")} == {
        "enable_thinking": False, "max_thinking_tokens": 3, "seed": None, "max_tokens": None
    }  # fmt: skip


@contextmanager
def crowd(server: Server) -> Iterator[None]:
    """Every place of the server is taken."""
    body = {"prompt": "a", "n": PLACES + 1, "max_tokens": 300, "ignore_eos": True, "stream": True}
    leave = threading.Event()

    def stay() -> None:
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as response:
            for _ in response.iter_raw():
                if leave.is_set():
                    return

    thread = threading.Thread(target=stay)
    thread.start()
    worker = server.app.state.worker
    wait_for(lambda: worker.num_running + worker.num_waiting == PLACES + 1)
    try:
        yield
    finally:
        leave.set()
        thread.join(30)
        wait_for(lambda: worker.num_running + worker.num_waiting == 0)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.browser
def test_stopping_and_waiting(page: Browser, guarded: Server) -> None:
    press = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))"
    page.run(f"const add = Answer.prototype.add; Answer.prototype.add = function (d) {{ add.call(this, d); {press}; }}")
    page.run(f"ask({QUESTION!r})")
    until(page, DONE)
    answer = turns(page)[1]
    assert answer["end"] == "stopped" and len(answer["reasoning"] + answer["content"]) < 12
    assert "stopped" in page.run("document.querySelector('.facts').textContent")
    page.run("Answer.prototype.add = add; $('fresh').click()")
    wait_for(lambda: guarded.app.state.worker.num_running == 0)

    with crowd(guarded):
        page.run(f"void ask({OTHER!r})")
        waiting = "document.querySelector('.waiting')?.textContent"
        until(page, f"/^The server is busy. Trying again in \\d+ s…$/.test({waiting})")
        page.run(press)
        until(page, DONE)
        page.run("pause = () => new Promise(ok => setTimeout(ok, 20))")
        page.run("document.querySelector('[aria-label=\"Answer again\"]').click()")
        until(page, f"{waiting}.includes('busy')")
    until(page, DONE)
    assert turns(page)[1]["content"] == answer_to(guarded, OTHER)["content"], "it came back by itself"

    page.run(f"ask({'word ' * 600!r})")
    until(page, "document.querySelector('.problem')")
    problem = page.run("document.querySelector('.problem').innerText")
    assert "the context of 512 must leave room" in problem and "Start a new conversation" in problem
    with pytest.raises(RuntimeError, match="TrustedHTML"):
        page.run("document.body.innerHTML = '<b>'")


PUT = """put = (text, dir = 'ltr') => {
  const box = document.createElement('div');
  Object.assign(box, { id: 'drawn', className: 'body', dir });
  $('drawn')?.remove();
  document.body.append(box);
  drawText(box, text, words);
  return box;
}; 0"""
HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "a <svg onload=window.pwned=1><style>*{display:none}</style><iframe srcdoc='<script>top.pwned=1</script>'>",
    "[a](javascript:window.pwned=1) [b](data:text/html,x) ![c](http://127.0.0.1:1/leak?secret)",
    "<a href='javascript:1'>d</a>",
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.pwned=1&gt;">',
    '<svg></p><style><a id="</style><img src=1 onerror=window.pwned=1>">',
    "[a][b] <http://127.0.0.1/\"onmouseover=\"window.pwned=1>\n\n[b]: javascript:window.pwned=1 \"t'onclick=1\"",
    "[x](java&#115;cript:window.pwned=1) <javascript:window.pwned=1>",
    '```"onmouseover="window.pwned=1\n</code></pre><img src=x onerror=window.pwned=1>\n```',
    '$"><img src=x onerror=window.pwned=1>$ \\boxed{<img src=x onerror=window.pwned=1>}',
    "$\\href{javascript:window.pwned=1}{x}$ $\\includegraphics{http://127.0.0.1:1/leak}$",
    "$\\htmlStyle{position:fixed}{x}$",
    "$\\def\\a{\\a\\a}\\a$ $\\rule{99999em}{99999em}$ " + "$" + "{" * 4000 + "$",
    "| <form action=//x><input> | `</td><script>window.pwned=1</script>` |\n|---|---|\n| [a](vbscript:x) | <base> |",
]  # fmt: skip


@pytest.mark.browser
def test_what_a_model_writes_runs_nothing(page: Browser) -> None:
    page.run(f"document.title = 'mine'; {PUT}")
    before = len(page.requests)
    for text in HOSTILE:
        found = page.run(
            f"(() => {{ const all = [...put({json.dumps(text)}).querySelectorAll('*')]; return ["
            "all.filter(n => n.matches('script,img,iframe,style,form,input,base,object,link,meta')).length,"
            "all.flatMap(n => [...n.attributes]).filter(a => a.name.startsWith('on')).length,"
            "all.filter(n => n.href && !n.closest('svg')).map(n => n.protocol).filter(p => p !== 'http:').length]})()"
        )
        assert found == [0, 0, 0], text
        assert page.run("$('drawn').textContent.length > 0 || $('drawn').children.length > 0"), "it is shown as text"
    assert page.run("[typeof pwned, document.title]") == ["undefined", "mine"]
    own = f"{page.run('location.origin')}/web/vendor/fonts/"
    assert [url for url in page.requests[before:] if not url.startswith(own)] == [] and page.console == []


@pytest.mark.browser
def test_markdown_formulas_and_both_directions(browser: Browser) -> None:
    browser.run(PUT)

    def drawn(text: str, expression: str, dir: str = "ltr") -> Any:
        return browser.run(f"(() => {{ const box = put({json.dumps(text)}, '{dir}'); return {expression}; }})()")

    formulas = "[...box.querySelectorAll('.katex annotation')].map(n => n.textContent)"
    all_forms = "so $x^2$, \\(y\\) and\n\n$$\na\n\n= b\n$$\n\n\\[c_1\\]"
    assert drawn(all_forms, formulas) == ["x^2", "y", "a\n\n= b", "c_1"]
    assert drawn("\\boxed{\\frac{1}{2}}, \\begin{cases} a \\\\ b \\end{cases}", formulas)[0] == "\\frac{1}{2}"
    prices = "from $5 to $6, `$x$`, 3*4*5=60 and 2*3*4"
    assert drawn(prices, "box.querySelectorAll('.formula, em').length") == 0
    assert drawn("$\\nonsense{$", "box.querySelector('.formula code').textContent") == "\\nonsense{"
    assert drawn("| a | b |\n|--:|---|\n| 1 | 2 |", "getComputedStyle(box.querySelector('td')).textAlign") == "right"
    code = "```python\nif a < b:\n    pass\n```"
    assert drawn(code, "box.querySelector('pre code').textContent") == "if a < b:\n    pass"
    assert drawn(code, "box.querySelector('figcaption').firstChild.data") == "python"

    arabic = "إذا كان $n = 2$ فالدالة `f(x)` تعطي 48/2=24.\n\n- أولًا\n- second\n\n12+3=15"
    rights = "[...box.querySelectorAll('p, li, ul')].map(n => n.matches(':dir(rtl)'))"
    assert drawn(arabic, rights, "rtl") == [True, True, True, False, True]
    lefts = (
        "[...box.querySelectorAll('code, .formula, bdi')].map(n => [n.textContent.slice(-4), n.matches(':dir(ltr)')])"
    )
    found = drawn(arabic, lefts, "rtl")
    assert len(found) == 4 and all(left for _, left in found)
    # What the eye sees: the left end of the sum stands left of its right end.
    browser.run(
        "const at = (box, i) => { const range = document.createRange(), text = box.querySelector('bdi').firstChild; "
        "range.setStart(text, i); range.setEnd(text, i + 1); return range.getBoundingClientRect().x; }"
    )
    assert drawn(arabic, "at(box, 0) < at(box, 5)", "rtl") is True


@pytest.mark.browser
def test_the_whole_page_in_arabic_and_on_a_phone(page: Browser) -> None:
    page.run("$('language').click()")
    root = "document.documentElement"
    assert page.run(f"[{root}.lang, {root}.dir, $('send').title]") == ["ar", "rtl", "أرسل"]
    page.run("$('digits').click()")
    page.run(f"ask({QUESTION!r})")
    until(page, DONE)
    assert "رمز" in page.run("document.querySelector('.facts').textContent")
    assert not set(page.run("document.querySelector('.facts').textContent")) & set("0123456789")
    assert page.run("[...document.querySelectorAll('[data-text]')].filter(n => !n.textContent).length") == 0
    page.run("const shape = w => Object.entries(w).map(([k, v]) => k + (typeof v === 'object' ? shape(v) : typeof v))")
    assert page.run("String(shape(WORDS.en)) === String(shape(WORDS.ar))"), "nothing is left untranslated"
    page.run("$('drawn')?.remove()")
    page.resize(390, 844, phone=True)
    try:
        for opened in ("0", "$('show-settings').click()", "$('settings').close(); $('show-talks').click()"):
            page.run(opened)
            assert page.faults() == [], opened
        page.press("Escape")
        assert page.run("document.querySelector('dialog[open]')") is None
        # Tab goes through the page in the order that it is read; every stop is visible.
        page.run("document.activeElement.blur(); document.querySelector('.skip').focus()")
        seen = []
        for _ in range(7):
            page.press("Tab")
            seen.append(page.run("document.activeElement.id"))
            assert page.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
        assert seen[:5] == ["show-talks", "fresh", "language", "theme", "show-settings"]
    finally:
        page.resize(1200, 900)
    assert page.run("(() => { $('theme').click(); return settings.theme })()") in ("dark", "light")
    assert page.console == []


def test_the_page_may_talk_to_its_server_alone(server: Server) -> None:
    policy = httpx.get(server.url).headers["content-security-policy"]
    for rule in ("default-src 'none'", "connect-src 'self'", "script-src 'self'", "require-trusted-types-for 'script'"):
        assert rule in policy
    assert "unsafe" not in policy
    script = httpx.get(f"{server.url}/web/page.js")
    assert (script.status_code, script.headers["x-content-type-options"]) == (200, "nosniff")
    again = httpx.get(f"{server.url}/web/page.js", headers={"if-none-match": script.headers["etag"]})
    assert (again.status_code, script.headers["cache-control"]) == (304, "no-cache")
    for path in ("/web/", "/web/%2e%2e/page.py", "/web/vendor/none.js"):
        assert httpx.get(server.url + path).status_code == 404, path
