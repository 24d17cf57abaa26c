"""Answers a question about a PDF with tools: a chat model decides when to search the document and when to compute.

The chat model has to be one that calls functions, such as Qwen 2.5 or 3 from 1.5B parameters on. Both models are ModelDeployments:

    pip install -r examples/langchain/requirements.txt
    python examples/langchain/agent.py --chat-url http://CHAT/v1 --chat-model chat \\
        --embedding-url http://EMBEDDING/v1 --embedding-model embedding "How much is 2 % of what the bank lends?"

It prints each call with its result, and the answer as it arrives.
"""

import ast
import operator
import os

from answer import arguments, retriever
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

SYSTEM = "Answer the question about a loan agreement. Search the agreement for facts, and use calculate for arithmetic."
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@tool
def calculate(expression: str) -> str:
    """Computes an arithmetic expression of numbers, + - * / and parentheses, such as "0.05 * (1200 + 300)"."""

    def value(node):
        match node:
            case ast.Constant(int() | float() as number):
                return number
            case ast.BinOp(left, operation, right) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](value(left), value(right))
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
        raise ValueError("only numbers, + - * / and parentheses are allowed")

    try:
        return str(value(ast.parse(expression, mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError) as error:
        # The model reads it and can try again.
        return f"Error: {error}"


def main():
    options = arguments(__doc__, SYSTEM)
    passages = retriever(options)

    @tool
    def search(query: str) -> str:
        """Finds the passages of the loan agreement that are nearest to a query."""
        return "\n".join(" ".join(document.page_content.split()) for document in passages.invoke(query))

    key = os.environ.get("OPENAI_API_KEY", "unused")
    chat = ChatOpenAI(base_url=options.chat_url, model=options.chat_model, api_key=key, temperature=0, max_tokens=256)
    agent = create_agent(chat, [search, calculate], system_prompt=options.system)
    question = {"messages": [{"role": "user", "content": options.question}]}
    print(f"Question: {options.question}")
    # Messages arrive in pieces, and steps once they are complete.
    for mode, data in agent.stream(question, {"recursion_limit": 12}, stream_mode=["messages", "updates"]):
        if mode == "messages":
            piece, _ = data
            if piece.type == "AIMessageChunk":
                print(piece.text, end="", flush=True)
            continue
        for message in (message for step in data.values() for message in step["messages"]):
            for call in getattr(message, "tool_calls", []):
                print(f"Call: {call['name']}({call['args']})")
            if message.type == "tool":
                print(f"Result: {message.content}")
    print()


if __name__ == "__main__":
    main()
