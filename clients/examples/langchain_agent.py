"""LangChain over HTTP: its OpenAI integration needs the address alone."""

import os

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel, Field

cluster = {
    "base_url": os.environ.get("LOCKSTEP_HTTP", "http://127.0.0.1:8080") + "/v1",
    "api_key": "none",
    "model": os.environ.get("LOCKSTEP_MODEL", "SmolLM2-135M-Instruct.Q4_1"),
}
model = ChatOpenAI(**cluster, temperature=0, max_tokens=100)

# A prompt template, and a chain.
prompt = ChatPromptTemplate([("system", "Answer in one sentence."), ("user", "{question}")])
chain = prompt | model | StrOutputParser()
print("chain:", chain.invoke({"question": "What is the capital of France?"}))

# Memory: an agent keeps the messages of each thread.
talk = create_agent(model, checkpointer=InMemorySaver())
for question in ["My name is Ada.", "What is my name?"]:
    said = talk.invoke({"messages": [("user", question)]}, {"configurable": {"thread_id": "one"}})
    print(f"memory, {len(said['messages'])} messages:", said["messages"][-1].text)


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=30)
    country: str = Field(max_length=30)


# The answer is constrained to the schema, so a small model keeps it, too.
print("structured:", model.with_structured_output(City, method="json_schema").invoke("Describe Paris."))


@tool
def population(city: City) -> str:
    """How many people live in a city."""
    return f"{city.name} has 2.1 million inhabitants."


@wrap_model_call
def call_then_answer(request, handler):
    """A large model chooses by itself when to call a tool; a small one is told to, once."""
    is_asked = request.messages[-1].type == "human"
    return handler(request.override(tool_choice="required" if is_asked else "none"))


agent = create_agent(model, [population], middleware=[call_then_answer])
for message in agent.invoke({"messages": [("user", "How many people live in Paris?")]})["messages"]:
    print("agent:", message.type, message.text or message.tool_calls)

# Without the last option the integration would send the token ids of OpenAI's own models.
embeddings = OpenAIEmbeddings(**cluster, check_embedding_ctx_length=False)
store = InMemoryVectorStore.from_texts(["Cats and dogs are pets.", "Rust is a programming language."], embeddings)
for document, score in store.similarity_search_with_score("I love my kitten."):
    print(f"vector store: {score:.3f} {document.page_content}")
