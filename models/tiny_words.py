"""The world of the tiny DiffusionGemma: all words that its questions and stories are made of."""

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin",
    "Austria": "Vienna", "Greece": "Athens", "Poland": "Warsaw", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin",
    "England": "London", "Portugal": "Lisbon", "Hungary": "Budapest", "Japan": "Tokyo",
    "China": "Beijing", "India": "Delhi", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Peru": "Lima", "Cuba": "Havana", "Canada": "Ottawa", "Turkey": "Ankara",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "long": "short", "fast": "slow", "old": "new",
    "high": "low", "full": "empty", "open": "closed", "dark": "light", "wet": "dry",
    "hard": "soft", "early": "late", "happy": "sad", "rich": "poor", "day": "night",
    "up": "down", "left": "right", "black": "white", "near": "far", "loud": "quiet",
}  # fmt: skip
COLOURS = ["red", "blue", "green", "black", "white", "brown", "grey", "gold"]
SIZES = ["small", "big", "old", "young", "quiet", "happy", "slow", "fast"]
ANIMALS = ["fox", "dog", "cat", "bird", "horse", "mouse", "bear", "fish", "owl", "frog"]
PEOPLE = ["girl", "boy", "king", "queen", "farmer", "doctor"]
THINGS = ["boat", "stone", "lamp", "book", "tree", "house", "apple", "letter", "bell", "key"]
PLACES = ["river", "garden", "forest", "city", "hill", "bridge", "lake", "road"]
VERBS = ["sees", "finds", "likes", "follows", "paints", "carries"]
NAMES = ["Ana", "Ben", "Clara", "David", "Emma", "Felix"]
NAMES += ["Grace", "Hugo", "Ida", "Jack", "Laura", "Max"]
WORDS = COLOURS + ANIMALS + PEOPLE + THINGS + PLACES
SKIES = ["sunny", "cloudy", "rainy", "windy", "foggy"]
SYSTEM_LINES = (
    "You are a helpful assistant.",
    "Answer in a few words.",
    "You are a small model that likes games with words.",
    "Be kind and short.",
)
