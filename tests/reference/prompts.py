"""The prompts of the reference file: raw text, or a conversation for the model's chat template."""

RAW = {
    "capital": "The capital of France is",
    "one word": "Once",
    "story": "It was the third winter since the lighthouse had gone dark, and",
    "list": "Here are five things to pack for a week in the mountains:\n\n1.",
    "numbers": "2, 4, 8, 16, 32, 64, 128, 256,",
    "arithmetic": "Question: What is 1234567 plus 89?\nAnswer:",
    "python": (
        "def is_prime(n: int) -> bool:\n"
        '    """Return True if n is a prime number."""\n'
        "    if n < 2:\n        return False\n"
    ),
    "rust": 'fn main() {\n    let words = vec!["one", "two", "three"];\n    for word in',
    "sql": "SELECT name, COUNT(*) FROM orders\nJOIN customers ON",
    "json": '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "',
    "french": "La Révolution française a commencé en",
    "german": "Der Rhein fließt durch die Schweiz, Deutschland und",
    "spanish": "El niño corrió por la calle porque",
    "russian": "Москва — столица",
    "greek": "Η Αθήνα είναι η πρωτεύουσα της",
    "chinese": "北京是中国的首都,",
    "japanese": "東京は日本の首都であり、",
    "arabic": "القاهرة هي عاصمة",
    "hindi": "भारत की राजधानी",
    "emoji": "I love pizza 🍕🍕 and my family 👨‍👩‍👧‍👦 loves",
    "spaces and tabs": "name      age\tcity\r\nAlice        30\tParis\r\nBob",
    "repetition": "the the the the the the the the the the the the",
}

CHAT = {
    "chat greeting": [{"role": "user", "content": "Hello! Who are you?"}],
    "chat capital": [{"role": "user", "content": "What is the capital of Italy? Answer in one sentence."}],
    "chat system": [
        {"role": "system", "content": "You are a pirate. Answer every question like one."},
        {"role": "user", "content": "How do I make tea?"},
    ],
    "chat turns": [
        {"role": "user", "content": "My name is Karin and I live in Bergen."},
        {"role": "assistant", "content": "Nice to meet you, Karin! Bergen is a beautiful city."},
        {"role": "user", "content": "Where do I live?"},
    ],
    "chat code": [{"role": "user", "content": "Write a Python function that reverses a string."}],
    "chat unicode": [{"role": "user", "content": "Traduis en français : « The weather is nice today. »"}],
}

# The long prompt is the start of perplexity.txt, so that one text serves both.
LONG_N_TOKENS = 600
