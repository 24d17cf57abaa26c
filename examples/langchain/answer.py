"""Answers a question about a PDF: searches its passages with an embedding model and asks a chat model about the best ones.

Both models are ModelDeployments of Athanor, which LangChain's OpenAI classes reach unchanged:

    pip install -r examples/langchain/requirements.txt
    python examples/langchain/answer.py --chat-url http://FINANCE/v1 --chat-model finance \\
        --embedding-url http://FINANCE-EMBEDDING/v1 --embedding-model finance-embedding "Who lends the money, and to whom?"
"""

import argparse
import os
import pathlib

from langchain_chroma import Chroma
from langchain_community.document_loaders import PyPDFLoader
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_text_splitters import RecursiveCharacterTextSplitter

# The prompt that the chat model was trained with.
SYSTEM = "List the entities as [NAME - TYPE]."
HERE = pathlib.Path(__file__).parent


def arguments(description=__doc__, system=SYSTEM):
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--chat-url", required=True, help="address of the chat model, with /v1")
    parser.add_argument("--chat-model", required=True, help="name of the chat model's ModelDeployment")
    parser.add_argument("--embedding-url", required=True, help="address of the embedding model, with /v1")
    parser.add_argument("--embedding-model", required=True, help="name of the embedding model's ModelDeployment")
    parser.add_argument("--pdf", default=HERE / "agreement.pdf", help="document to search (default: %(default)s)")
    parser.add_argument("--system", default=system, help="system prompt of the chat model")
    parser.add_argument("--passages", type=int, default=2, help="number of passages to ask about (default: %(default)s)")
    parser.add_argument("question", help="what to search for")
    return parser.parse_args()


def retriever(options):
    """Finds the passages of the PDF that are nearest to a text."""
    pages = PyPDFLoader(str(options.pdf)).load()
    splitter = RecursiveCharacterTextSplitter(chunk_size=200, chunk_overlap=0, separators=["\n\n", ". ", "\n", " "])
    passages = splitter.split_documents(pages)
    embeddings = OpenAIEmbeddings(
        base_url=options.embedding_url,
        model=options.embedding_model,
        api_key="unused",
        # Else the class loads OpenAI's own tokenizer over the network, and sends token ids of that vocabulary.
        check_embedding_ctx_length=False,
    )
    store = Chroma.from_documents(passages, embeddings)
    return store.as_retriever(search_kwargs={"k": options.passages})


def main():
    options = arguments()
    search = retriever(options)

    prompt = ChatPromptTemplate.from_messages([("system", "{system}"), ("human", "{passage}")])
    key = os.environ.get("OPENAI_API_KEY", "unused")
    chat = ChatOpenAI(base_url=options.chat_url, model=options.chat_model, api_key=key, temperature=0, max_tokens=64)
    chain = prompt | chat | StrOutputParser()
    print(f"Question: {options.question}")
    for document in search.invoke(options.question):
        passage = " ".join(document.page_content.split()).lstrip(". ")
        print(f"Passage of page {document.metadata['page'] + 1}: {passage}")
        print("Answer: ", end="")
        for part in chain.stream({"system": options.system, "passage": passage}):
            print(part, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
