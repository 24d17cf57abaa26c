"""The standard suites of langchain-tests for chat models and for embeddings, with langchain-openai and our servers."""

import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests


class TestChat(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _address(self, coder):
        type(self).address = coder[0]

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        # Without the penalty this small model may repeat a sentence until its context is full.
        return {"base_url": f"{self.address}/v1", "api_key": "none", "model": "coder", "max_retries": 0, "stream_usage": True,
                "temperature": 0.7, "seed": 1, "frequency_penalty": 0.3}

    @property
    def supports_json_mode(self):
        return True


class TestEmbeddings(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _address(self, any_embedding_model):
        type(self).address = any_embedding_model[0]

    @property
    def embeddings_class(self):
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self):
        # Texts are sent as they are: the client would count their tokens by a vocabulary that it downloads.
        return {"base_url": f"{self.address}/v1", "api_key": "none", "model": "mini", "check_embedding_ctx_length": False}
