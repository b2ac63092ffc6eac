"""The page at /, in headless Chromium: a chat behind an API key, and a Sudoku model that knows one puzzle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nemo_diffgemma import DiffusionGemma, ModelConfig
from nemo_diffgemma.data.sudoku import encode_puzzle, solve
from nemo_diffgemma.data.sudoku_tokenizer import EOS_ID, build_tokenizer
from nemo_diffgemma.repository import CONF
from tests.serving import browser as browsers
from tests.serving import served

KEY = "a-key"
PUZZLE, SOLUTION = "..4.2..1.2..1...", "3142243142131324"
ROWS, STEPS = 16, 160  # of learning by heart
MARKUP = '<img src="x" onerror="document.title=1"><b>bold</b>'
DIGITS = "[...document.querySelectorAll('#grid input')].map(cell => cell.value)"
FOCUS = """[document.activeElement.id || document.activeElement.textContent.trim(), document.activeElement.tagName,
    getComputedStyle(document.activeElement).outlineStyle]"""


def that_knows_one_puzzle() -> DiffusionGemma:
    """A network of the demo's size that has learnt by heart to denoise to SOLUTION."""
    sizes = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "sudoku.yaml").architecture)
    network = DiffusionGemma(ModelConfig(**sizes, eos_token_id=EOS_ID))
    network.init_weights(0)
    digits = torch.tensor([EOS_ID + 4 + int(digit) for digit in SOLUTION])
    prompts = torch.tensor([encode_puzzle([int(cell.replace(".", "0")) for cell in PUZZLE])] * ROWS)
    optimizer, draw = torch.optim.Adam(network.parameters()), torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=STEPS)
    for _ in range(STEPS):
        noised = torch.rand(ROWS, 16, generator=draw) < torch.rand(ROWS, 1, generator=draw)
        canvases = torch.where(noised, torch.randint(64, (ROWS, 16), generator=draw), digits)
        cache = network.encode(prompts)
        stream = network.stream(cache.sequences, canvases=[(row, prompts.shape[1]) for row in range(ROWS)])
        hidden = network.run(canvases.flatten(), stream, cache=cache, replicas_alike=True).canvas_hidden
        logits = 30 * torch.tanh(hidden.flatten(0, -2) @ network.embed_tokens.weight.T / 30)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, digits.repeat(ROWS)).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@pytest.fixture(scope="module")
def browser():
    with browsers.chromium() as made:
        yield made


def serving(checkpoint: Any, **settings: Any) -> Any:
    made = served.Split(checkpoint, 1, dict(context_gb=0.02, typical_tokens=700, max_running=3), **settings)
    made.ready(1)
    return made


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory, single):
    made = serving(served.write_checkpoint(tmp_path_factory.mktemp("chat") / "model"), api_keys=[KEY])
    made.server.http.headers["Authorization"] = f"Bearer {KEY}"
    yield made.server
    made.close()


@pytest.fixture(scope="module")
def sudoku_server(tmp_path_factory, single):
    directory = tmp_path_factory.mktemp("sudoku") / "model"
    network = that_knows_one_puzzle()
    network.save_huggingface(directory)
    build_tokenizer().save_pretrained(directory)
    made = serving(directory)
    yield made.server
    made.close()


@pytest.fixture
def open_tab(browser):
    tabs = []

    def make(server: Any, **options: Any) -> Any:
        tabs.append(browsers.Tab(browser, server.url, **options))
        return tabs[-1]

    yield make
    for tab in tabs:
        tab.close()


@pytest.fixture
def chat(open_tab, chat_server):
    """The page after its key was given, with short quick answers."""
    tab = open_tab(chat_server)
    page = tab.page
    page.wait_for_selector("#alert:has-text('API key')")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_selector("#chat:visible")
    for id, value in {"steps": "4", "canvas-length": "16", "max-tokens": "48", "seed": "7", "bound": "20"}.items():
        page.fill(f"#{id}", value)
    page.select_option("#pace", "0")
    return tab


def send(page: Any, text: str) -> Any:
    """The turn that answers, when it is whole."""
    page.fill("#message", text)
    page.press("#message", "Enter")
    turn = page.locator(".turn.model").last
    turn.locator(".figures").wait_for()
    return turn


def test_nobody_else_is_asked_and_the_key_is_asked_for(chat, chat_server):
    """Browsers are told so, too; the key goes to the API alone, and is kept nowhere."""
    answer = chat_server.http.get("/")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    send(chat.page, "Hello")
    assert all(one.url.startswith(chat_server.url) for one in chat.asked)
    keyed = {one.url.removeprefix(chat_server.url) for one in chat.asked if "authorization" in one.headers}
    assert keyed == {"/v1/models", "/v1/chat/completions"}
    assert chat.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_a_message_streams_settles_and_goes_back_through_its_steps(chat, chat_server):
    page = chat.page
    page.evaluate(
        """() => { window.drawn = new Set(); new MutationObserver(() => {
            const canvas = document.querySelector(".canvas"); if (canvas) drawn.add(canvas.ariaLabel);
        }).observe(document.getElementById("log"), {subtree: true, childList: true, attributes: true}); }"""
    )
    page.select_option("#pace", "50")
    turn = send(page, "Hello")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "seed": 7, "max_tokens": 48}
    body["diffusion"] = {"max_denoising_steps": 4, "canvas_length": 16, "entropy_bound": 20.0}
    choice = chat_server.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert turn.locator("> .text").text_content() == choice["message"]["content"]

    turn.get_by_role("button", name="Play").wait_for()  # all that came was shown
    assert len(page.evaluate("[...drawn]")) > 1, "the canvas was redrawn while it settled"
    slider, cells = turn.locator("input[type=range]"), turn.locator(".canvas")
    steps = choice["diffusion"]["steps"]
    assert int(slider.get_attribute("max")) == steps - 1
    assert cells.locator(".cell").count() == 16 and cells.locator(".cell[data-accepted]").count() > 0
    last = cells.get_attribute("aria-label")
    slider.focus()
    page.keyboard.press("Home")
    assert cells.get_attribute("aria-label").startswith("canvas 1, step 1:")
    assert last.startswith(f"canvas {choice['diffusion']['canvases']}, step")
    seen = [slider.get_attribute("aria-valuetext")]
    for _ in range(steps - 1):
        page.keyboard.press("ArrowRight")
        seen.append(slider.get_attribute("aria-valuetext"))
    assert len(set(text.split(":")[0] for text in seen)) == steps and cells.get_attribute("aria-label") == last
    turn.get_by_role("button", name="Play").click()
    turn.get_by_role("button", name="Play").wait_for()  # it has played to the end
    assert cells.get_attribute("aria-label") == last
    assert turn.locator(".figures").text_content().endswith("seed7")


def test_several_turns_are_one_conversation_and_text_is_text(chat):
    page = chat.page
    first = send(page, MARKUP).locator("> .text").text_content()
    send(page, "And then?")
    messages = chat.asked[-1].post_data_json["messages"]
    assert [message["content"] for message in messages] == [MARKUP, first, "And then?"]
    assert page.locator(".turn.user .text").first.text_content() == MARKUP
    assert page.locator("img, b").count() == 0 and page.title() == "DiffusionGemma"
    page.click("#new-chat")
    send(page, "Again")
    assert [message["content"] for message in chat.asked[-1].post_data_json["messages"]] == ["Again"]


def test_stop_ends_the_answer_here_and_on_the_server(chat, chat_server):
    page = chat.page
    page.fill("#max-tokens", "2000")
    page.fill("#bound", "0.01")
    page.fill("#steps", "1000")
    page.fill("#message", "Hello")
    page.press("#message", "Enter")
    page.locator(".turn.model .cell").first.wait_for()
    page.click("#stop")
    page.get_by_text("Stopped by you.").wait_for()
    chat_server.until("engine_slots_taken", lambda slots: slots == 0)
    assert page.is_enabled("#send") and page.is_disabled("#stop")


def test_an_error_is_text_and_the_message_is_not_lost(chat):
    page = chat.page
    page.fill("#canvas-length", "9999")
    page.fill("#message", "Hello")
    page.press("#message", "Enter")
    page.wait_for_selector("#chat-alert:has-text('canvas_length=9999')")
    assert page.input_value("#message") == "Hello" and page.locator(".turn").count() == 0
    page.fill("#canvas-length", "16")
    send(page, "Hello")
    assert page.is_hidden("#chat-alert")


def test_the_keyboard_reaches_everything_and_leaves_again(chat):
    page = chat.page
    send(page, "Hello")
    page.locator("button.play:has-text('Play')").wait_for()  # all steps have been shown
    page.locator("summary").first.evaluate("() => document.activeElement.blur()")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, tag, outline = page.evaluate(FOCUS)
        assert outline != "none" or tag == "BODY", f"the focus on {name} cannot be seen"
        reached.append(name)
    wanted = {"show-chat", "show-infill", "message", "send", "new-chat", "model", "seed", "key", "Play", "Settings"}
    assert wanted <= set(reached), wanted - set(reached)
    assert reached.count("show-chat") > 1, "the tabulator goes around"
    page.focus("#send")
    page.fill("#message", "Once more")
    page.focus("#send")
    page.keyboard.press("Space")
    page.locator(".turn.model").nth(1).locator(".figures").wait_for()
    assert page.evaluate("document.activeElement.id") == "send", "the focus is where it was"


def test_holes_are_filled_around_what_is_locked(chat, chat_server):
    page = chat.page
    page.click("#show-infill")
    page.fill("#canvas-length", "")
    page.fill("#template", "Once {4} and {2-5} end.")
    assert page.text_content("#preview") == "Once 4 tokens and 2 to 5 tokens end."
    page.click("#fill")
    text = page.locator("#infill-result .filled")
    text.wait_for()
    body = {
        "model": "tiny",
        "text": ["Once ", {"hole": 4}, " and ", {"hole": {"min": 2, "max": 5}}, " end."],
        "seed": 7,
    }
    body["diffusion"] = {"max_denoising_steps": 4, "entropy_bound": 20.0}
    choice = chat_server.http.post("/v1/infill", json=body).json()["choices"][0]
    assert text.text_content() == choice["text"]
    assert text.locator("mark").all_text_contents() == [hole["text"] for hole in choice["holes"]]
    assert "4 lengths were tried" in page.text_content("#infill-result")
    cells, free = page.locator("#infill-result .canvas .cell"), sum(len(hole["token_ids"]) for hole in choice["holes"])
    assert cells.count() == len(choice["diffusion"]["token_ids"])
    assert page.locator("#infill-result .canvas .cell[data-locked]").count() == cells.count() - free
    assert browsers.violations(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_accessible_and_fit_a_telephone(open_tab, chat_server, scheme):
    tab = open_tab(chat_server, color_scheme=scheme, viewport={"width": 360, "height": 700})
    page = tab.page
    page.wait_for_selector("#alert:visible")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_selector("#chat:visible")
    page.fill("#max-tokens", "64")
    send(page, "Hello")
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(red, green, blue) < 60) == (scheme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    assert browsers.violations(page) == []


def test_a_grid_is_edited_and_watched_being_solved(open_tab, sudoku_server):
    page = open_tab(sudoku_server).page
    cells = page.locator("#grid input")
    read = lambda: [int(value or 0) for value in page.evaluate(DIGITS)]
    page.wait_for_selector("#sudoku:visible")
    assert read() == [int(cell) if cell != "." else 0 for cell in PUZZLE]
    page.click("#solve")
    page.wait_for_selector("#sudoku-verdict:has-text('Solved in')")
    assert "".join(map(str, read())) == SOLUTION
    assert page.locator("#grid [data-clue]").count() == 5 and page.locator("#grid [data-accepted]").count() == 11
    assert browsers.violations(page) == []

    page.focus("#sudoku-result input[type=range]")
    page.keyboard.press("Home")
    assert page.get_attribute("#sudoku-result input[type=range]", "aria-valuetext").startswith("canvas 1, step 1:")

    cells.nth(0).focus()  # the model's digits make room for those of a person
    page.keyboard.press("4")
    assert read() == [4, 0, 4, 0, 2, 0, 0, 1, 0, 2, 0, 0, 1, 0, 0, 0] and page.text_content("#sudoku-verdict") == ""
    assert page.locator("#grid [aria-invalid=true]").count() == 2, "two fours in a row"
    page.click("#solve")
    page.wait_for_selector("#sudoku-verdict:has-text('There is no solution: the marked digits stand twice')")
    cells.nth(0).focus()
    page.keyboard.press("Backspace")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('#grid input')].indexOf(document.activeElement)") == 5

    page.click("#clear")
    cells.nth(0).fill("1")  # the model knows one puzzle, which begins with 3
    page.keyboard.press("Enter")
    page.wait_for_selector("#sudoku-verdict:has-text('Not solved')")


def test_new_puzzles_have_one_solution(open_tab, sudoku_server):
    page = open_tab(sudoku_server).page
    page.wait_for_selector("#sudoku:visible")
    puzzles = page.evaluate(
        """async () => {
            const { newPuzzle } = await import("/page/sudoku_rules.js");
            return Array.from({length: 50}, () => newPuzzle());
        }"""
    )
    assert all(len(solve(puzzle)) == 1 for puzzle in puzzles)
    assert len({tuple(puzzle) for puzzle in puzzles}) > 40
    assert all(5 < sum(map(bool, puzzle)) < 12 for puzzle in puzzles)


def test_a_reader_of_the_page_alone_gets_its_files_and_no_others(chat_server):
    """Without a key."""
    http = chat_server.http
    del http.headers["Authorization"]
    try:
        assert http.get("/page/app.js").headers["Content-Type"].startswith("text/javascript")
        assert http.get("/v1/models").status_code == 401
        for path in ("/page/nothing.js", "/page/..%2Ffront.py", "/page/../v1/models", "/page/"):
            assert http.get(path).status_code in (401, 404), path
    finally:
        http.headers["Authorization"] = f"Bearer {KEY}"


def test_the_model_says_that_it_is_a_sudoku_model(chat_server, sudoku_server):
    about = [server.http.get("/v1/models").json()["data"][0]["diffusion"] for server in (chat_server, sudoku_server)]
    assert [one["task"] for one in about] == [None, "sudoku"]
    assert [one["takes_conversations"] for one in about] == [True, False]
