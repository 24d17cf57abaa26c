"""examples/langchain/agent.py, in its own environment, with a scripted chat model and a real server of the embedding model."""

import http.server
import json
import os
import pathlib
import subprocess
import threading

PROGRAM = pathlib.Path(__file__).parents[2] / "examples" / "langchain" / "agent.py"


class Scripted(http.server.BaseHTTPRequestHandler):
    """A language model that searches, then computes, then answers with the number it got."""

    asked = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        results = [message["content"] for message in body["messages"] if message["role"] == "tool"]
        if not results:
            deltas = self.call("search", {"query": "How much does Bank lend?"})
        elif len(results) == 1:
            deltas = self.call("calculate", {"expression": "0.02 * 2000000"})
        else:
            deltas = [{"content": piece} for piece in ("It is ", results[-1], " euro.")]
        reason = "stop" if len(results) == 2 else "tool_calls"
        chunks = [{"index": 0, "delta": delta, "finish_reason": None} for delta in ({"role": "assistant", "content": ""}, *deltas)]
        chunks.append({"index": 0, "delta": {}, "finish_reason": reason})
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "scripted"}
        lines = [json.dumps({**head, "choices": [chunk]}) for chunk in chunks] + ["[DONE]"]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write("".join(f"data: {line}\n\n" for line in lines).encode())

    def call(self, name, arguments):
        """A call in the pieces in which athanor-server sends it."""
        text = json.dumps(arguments)
        head = {"index": 0, "id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": ""}}
        parts = [{"index": 0, "function": {"arguments": piece}} for piece in (text[:7], text[7:])]
        return [{"tool_calls": [part]} for part in (head, *parts)]

    def log_message(self, *_):
        pass


def test_an_agent_searches_computes_and_streams_its_answer(embedding_model):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [os.environ["ATHANOR_EXAMPLES_PYTHON"], PROGRAM, "--chat-url", f"http://127.0.0.1:{server.server_port}/v1"]
    command += ["--chat-model", "scripted", "--embedding-url", f"{embedding_model[0]}/v1", "--embedding-model", "mini"]
    environment = dict(os.environ, ANONYMIZED_TELEMETRY="False")
    ended = subprocess.run(
        [*command, "How much is 2 % of what the bank lends?"], capture_output=True, text=True, timeout=300, env=environment
    )
    server.shutdown()
    assert ended.returncode == 0, ended.stderr
    assert "Call: search({'query': 'How much does Bank lend?'})" in ended.stdout
    # The passage is in the PDF, and is found by the real embedding model.
    assert "2,000,000 euro" in ended.stdout
    assert "Result: 40000.0" in ended.stdout
    assert ended.stdout.rstrip().endswith("It is 40000.0 euro.")
    first, second, third = Scripted.asked
    assert [tool["function"]["name"] for tool in first["tools"]] == ["search", "calculate"]
    assert first["messages"][0]["role"] == "system" and first["stream"]
    (call,) = second["messages"][-2]["tool_calls"]
    assert (call["id"], second["messages"][-1]["tool_call_id"]) == ("call_search", "call_search")
    assert "2,000,000 euro" in second["messages"][-1]["content"]
    assert third["messages"][-1]["content"] == "40000.0"
