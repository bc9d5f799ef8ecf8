"""Steps that look at one row at a time: cut-off and empty answers, refusals, the teacher's own identity, the prompt said again.

What counts as a refusal or as a leaked identity is in tables of plain phrases below; how well they do on labelled answers is measured in
tests/unit/test_curation.py. Each looks for phrases in which an answer speaks of itself: an answer that mentions a refusal, or ChatGPT, is kept.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from stillroom.data.curation import Finding, Row, Sifted, sift_each
from stillroom.data.prompts import Message, Prompt
from stillroom.data.words import grams, normalised, shortened, words

# --- cut off, or nothing there -------------------------------------------------------------------------------------------------------------

_CUT = frozenset({"length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded", "content_filter", "safety"})
_THOUGHT = tuple(f"<{name}>" for name in ("think", "thinking", "thought", "reasoning", "reflection", "scratchpad"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Drops answers that were cut off: by what the endpoint says (`finish_reasons`, in any case), or with a reasoning block that is never closed.

    A row without a finish reason is judged by its text alone. A tag in the middle of a line is taken to be spoken of, not used.
    """

    name: ClassVar[str] = "truncation"
    finish_reasons: frozenset[str] = _CUT
    reasoning_tags: tuple[str, ...] = _THOUGHT

    def sift(self, rows: Sequence[Row]) -> Sifted:
        return sift_each(self.name, rows, self._judge)

    def _judge(self, row: Row) -> Finding | None:
        if row.finish_reason is not None and row.finish_reason.lower() in self.finish_reasons:
            return Finding(reason="truncated", evidence=f"finish reason {shortened(row.finish_reason)}")
        for tag in self.reasoning_tags:
            opened = _last_at_line_start(row.answer, tag)
            if opened >= 0 and row.answer.find(f"</{tag[1:]}", opened) < 0:
                return Finding(reason="unterminated-reasoning", evidence=f"{tag} at character {opened + 1} is never closed")
        return None


def _last_at_line_start(text: str, tag: str) -> int:
    """Where `tag` last stands first on a line, after no more than blanks; -1 where it does not."""
    at = text.rfind(tag)
    while at >= 0:
        blanks = at
        while blanks > 0 and at - blanks < 16 and text[blanks - 1] in " \t":
            blanks -= 1
        if blanks == 0 or text[blanks - 1] == "\n":
            return at
        at = text.rfind(tag, 0, at)
    return -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Emptiness:
    """Drops answers in which nothing can be seen: no character, or spaces, controls and invisible characters alone."""

    name: ClassVar[str] = "emptiness"

    def sift(self, rows: Sequence[Row]) -> Sifted:
        return sift_each(self.name, rows, self._judge)

    def _judge(self, row: Row) -> Finding | None:
        if any(not character.isspace() and unicodedata.category(character) not in ("Cf", "Cc", "Cn", "Co") for character in row.answer):
            return None
        return Finding(reason="empty-answer", evidence=f"{len(row.answer)} characters, none of them visible")


# --- refusals ------------------------------------------------------------------------------------------------------------------------------

_OPENING_CHARACTERS = 600
_OPENING_SENTENCES = 3
# A sentence ends at its mark, or at a line's end; the marks of Chinese need no space after them.
_SENTENCE = re.compile(r"(?<=[.!?])\s|[\n。！？]")
_QUOTES = "\"'“”‘’«»„「」『』`>*"

# What may stand before "I cannot" in the same sentence; taken off from the front, one after the other, in any order.
_HEDGE = re.compile(
    r"(?:(?:i'm |i am )?(?:really |very |so |truly |deeply )?sorry (?:that|to hear)[^.!?;]{0,120}?(?=,? ?\bbut\b)|i(?:'m| am)? (?:(?:very|truly|really|so|deeply|terribly) )?(?:sorry|apologi[sz]e|afraid|regret)(?: (?:but|that|to say|to inform you that))?"
    r"|(?:my|sincere) apologies|apologies|sorry(?: about that| for (?:any|the) inconvenience)?|unfortunately|regrettably|regretfully|however|but|no|"
    r"(?:thank you|thanks) for (?:asking|your (?:question|request|message|understanding|interest|patience)|reaching out|sharing that)"
    r"|i (?:understand|appreciate|see|know|realise|realize|hear)[^.!?;]{0,160}?(?=,? ?(?:\bbut\b|\bhowever\b))"
    r"|as an? (?:[\w-]+ ){0,4}(?:ai|assistant|model|chatbot)|as a (?:matter of policy|result)|at this time|in this case|for (?:safety|ethical|legal) reasons"
    r"|hello|hi|hi there|well|please note that|i must (?:inform|tell) you that|that said|to be clear|with respect"
    r"|hmm+|um"
    r"|como (?:un |una )?(?:ia|inteligencia artificial|modelo de lenguaje|asistente)[^,.]{0,40},|en tant qu[e'][^,.]{0,40},"
    r"|leider|es tut mir (?:sehr )?leid|tut mir leid|entschuldigung|aber|je suis (?:vraiment )?désolée?|désolée?|malheureusement|mais|je regrette"
    r"|lo siento(?: mucho)?|lamentablemente|desafortunadamente|pero|disculpa|perdón|很抱歉|抱歉|对不起|非常抱歉|不好意思|但是?|作为(?:一个|一名|一款)?[^，,]{0,20}[，,])"
    r"[\s,;:.，、—–-]{0,4}",
)

_DO = (
    r"(?:help|assist|support|provid|comply|compl|do (?:that|this|so|it)\b(?! on| in| at| if| when)|fulfil|answer|respond|creat|writ|generat|produc|discuss|share|engag|continu|giv|offer (?:advice|help|guidance|instructions|support|information)|"
    r"participat|facilitat|accommodat|proceed|recommend (?:a|any|specific|that|doing)\b|advise|explain how|tell you how|show you how|teach you|encourag|promot|condone|endorse|disclose|reveal|"
    r"translat|describ|carry out|perform|process|satisfy|grant|agree to|go along|take part|be part|be involved|say that|talk about|speak (?:to|about|on)|"
    r"access|browse|open (?:links|urls|files|attachments)|view|see (?:images|pictures|photos)|predict|diagnos|make (?:that|this|a|any)|allow|draft|compose|list|"
    r"roleplay|role-play|pretend|act as|impersonat|in good conscience|ethically|legally|responsibly)"
)
_BY = r"(?:\w+ly |also |directly |in good conscience |under any circumstances |possibly |be able to ){0,2}"
_REFUSALS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?:i|we) (?:can ?not|can't|cant|could not|couldn't|will not|won't|must not|am not going to|shall not|would not|can neither|am just not able to) {_BY}{_DO}(?!\w* but )",
        r"i (?:do not|don't) (?:provide|engage|participate|assist|help with|support (?:violence|harm|hate|illegal)|generate|discuss|share|comment on)",
        r"i(?:'d| would) (?:rather|prefer) not (?:to )?(?:write|say|answer|discuss|do|share|help|go|comment)",
        r"(?:my|our|the) (?:guidelines|policies|policy|principles|rules|programming|safety guidelines)(?: \w+)? (?:prevent|prohibit|forbid|do not allow|don't allow|do not permit|restrict)",
        rf"(?:i'm|i am|we are|we're) (?:just |simply |sorry, )?(?:not (?:able|allowed|permitted|comfortable|willing|authori[sz]ed|in a position|going|programmed|designed|capable|here)"
        rf"|unable|prohibited from|prevented from|restricted from)(?: to| of| with)? {_BY}{_DO}",
        r"(?:i|we) ?(?:must|have to|need to|'m going to have to|am going to have to|'ll have to|will have to|respectfully|would have to) (?:respectfully |politely )?"
        r"(?:decline|refuse|pass on|say no)(?! the noun| the verb)",
        r"(?:i|we) (?:respectfully |politely )?(?:decline|refuse) to ",
        r"i (?:don't|do not) (?:feel comfortable|have the (?:ability|capability|authority)|have access to|engage in|participate in|support|condone)",
        r"(?:that|this|it)(?:'s| is| would be)? (?:request )?(?:is )?(?:not something (?:i|we)(?: can|'m able| am able)|something (?:i|we) (?:can't|cannot|won't|will not))",
        r"(?:your|this|that|the) (?:request|prompt|question) (?:violates|goes against|is against|conflicts with|(?:cannot|can't) be (?:fulfilled|answered|completed|processed))",
        r"(?:it (?:is|would be|would not be|wouldn't be) (?:against (?:my|our|the law|policy)|(?:not )?(?:appropriate|ethical|legal) (?:for me|to (?:provide|help|assist))))",
        r"(?:providing|creating|writing|sharing|generating|assisting)[^.!?]{0,80} (?:goes against|violates|is against|would violate|would be against) (?:my|our|the)",
        r"(?:ich|wir) (?:kann|können|darf|werde|möchte)\b[^.!?]{0,120}?\b(?:nicht|keine?[nrms]?)\b[^.!?]{0,80}?\b(?:helfen|unterstützen|beantworten|bereitstellen|"
        r"erstellen|geben|weiterhelfen|schreiben|anbieten|liefern|verfassen|erfüllen|nachkommen|tun|behilflich)",
        r"(?:ich|wir) (?:kann|können|darf|werde) (?:auf )?(?:diese|dieser|ihre|deine|solche|dieses|diesen)\w* [\w ]{1,40} (?:leider )?nicht ",
        r"(?:kann|darf|können|dürfen) (?:ich|wir)\b[^.!?]{0,60}\b(?:nicht|keine?[nrms]?)\b[^.!?]{0,60}\b(?:helfen|unterstützen|beantworten|bereitstellen|erstellen|geben|"
        r"weiterhelfen|schreiben|anbieten|liefern|verfassen|erfüllen|nachkommen|tun)",
        r"(?:das|dabei|damit|hierbei|dazu)(?: [\w ]{1,30})? (?:kann|darf|werde) ich (?:\w+ ){0,3}(?:nicht|keine)",
        r"(?:je|nous) ne (?:peux|puis|pouvons|suis|vais)\s?(?:pas|malheureusement pas)?\s?(?:pas )?(?:en mesure de |capable de |autorisée? à |vous )*(?:aider|répondre|fournir|"
        r"assister|créer|écrire|donner|satisfaire|accéder|produire|générer|partager|discuter|faire (?:cela|ça)|rédiger|accepter|expliquer|traiter)",
        r"(?:no|yo no) (?:puedo|podemos|podré|me es posible|estoy (?:autorizad[oa]|en condiciones|en posición)|me está permitido)(?: a| de| para)? (?:\w+ ){0,1}?"
        r"(?:ayudar|proporcionar|asistir|responder|crear|escribir|generar|ofrecer|cumplir|dar|compartir|hacer|brindar|participar|atender|continuar|discutir|completar)",
        r"(?:我|我们|本人)?(?:无法|不能|不可以|没有办法|没办法|不便|不会|拒绝)(?:为您|为你|向您|向你|给您|给你|直接|继续)?(?:提供|回答|协助|帮助|满足|完成|生成|创建|编写|撰写|讨论|处理|支持|参与|告诉|执行|答复|给出|描述)",
    )
)
_LETTER = re.compile(r"^(?:dear|sehr geehrte|liebe|cher|chère|estimad[oa]|querid[oa]) ")
_TURNS = re.compile(
    r"\b(?:here(?:'s| is| are)|but i can (?:tell|explain|give|show|say|offer|suggest you|help you (?:by|with))|the following|in general|generally|"
    r"hier ist|voici|aquí (?:tienes|está))\b|(?:^|\n)(?:```|1\.|- |\* )"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Drops answers that decline to answer: in one of the first sentences the answer itself says that it will not, or cannot, do what was asked.

    English, German, French, Spanish and Chinese. An answer that quotes a refusal or is about one is kept, and so is one that goes on to answer: that
    has more than `longest_characters`, or turns to its matter after a reservation ("here is", a list, code). A letter (Dear ...) is kept.
    """

    name: ClassVar[str] = "refusal"
    longest_characters: int = 1500

    def sift(self, rows: Sequence[Row]) -> Sifted:
        return sift_each(self.name, rows, self._judge)

    def _judge(self, row: Row) -> Finding | None:
        text = _without_reasoning(row.answer)
        if len(text) > self.longest_characters:
            return None
        plain = _plain_apostrophes(text.lower())
        if _TURNS.search(plain) or _LETTER.match(plain):
            return None
        for sentence in _opening(plain):
            if sentence[0] not in _QUOTES and _refuses(sentence):
                return Finding(reason="refusal", evidence=shortened(sentence, 160))
        return None


def _refuses(sentence: str) -> bool:
    """Whether a sentence refuses, once what may stand before that is taken off."""
    for _ in range(5):
        if any(pattern.match(sentence) for pattern in _REFUSALS):
            return True
        hedge = _HEDGE.match(sentence)
        if hedge is None or hedge.end() == 0:
            return False
        sentence = sentence[hedge.end() :]
    return False


def _opening(text: str) -> Iterator[str]:
    """The first sentences of `text`, none of them empty."""
    found = (part.strip() for part in _SENTENCE.split(text[:_OPENING_CHARACTERS]))
    for _, sentence in zip(range(_OPENING_SENTENCES), filter(None, found), strict=False):
        yield sentence


def _plain_apostrophes(text: str) -> str:
    return text.replace("\u2019", "'").replace("\u02bc", "'")


def _without_reasoning(answer: str) -> str:
    """What follows a reasoning block that opens the answer; the answer where none does."""
    text = answer.strip()
    for tag in _THOUGHT:
        if text.startswith(tag) and (end := text.find(f"</{tag[1:]}")) >= 0:
            return text[end + len(tag) + 1 :].strip()
    return text


# --- identity ------------------------------------------------------------------------------------------------------------------------------

# Names of assistants and models, and of those who make them. A name counts only where an answer says it of itself.
ASSISTANTS = (
    "chatgpt gpt-?[345][\\w.-]{0,12} claude gemini bard llama qwen tongyi deepseek mistral mixtral le chat copilot grok palm lamda ernie yi kimi doubao phi command[- ]r "
    "nova falcon vicuna alpaca gemma minimax glm chatglm baichuan hunyuan jamba pi replika 通义千问 文心一言 豆包 千问 智谱清言 混元 讯飞星火 元宝 小爱"
)
MAKERS = (
    "openai|open ai|anthropic|google(?: deepmind)?|deepmind|meta(?: ai)?|microsoft|alibaba(?: cloud)?|阿里云|阿里巴巴|阿里|百度|baidu|deepseek|深度求索|mistral(?: ai)?|xai|cohere|"
    "bytedance|字节跳动|tencent|腾讯|moonshot(?: ai)?|月之暗面|zhipu(?: ai)?|智谱|ai21(?: labs)?|inflection(?: ai)?|amazon|nvidia|01\\.ai|零一万物|tii|minimax|科大讯飞"
)
_ASSISTANT = "(?:" + "|".join(ASSISTANTS.replace("le chat", "le_chat").replace("command[- ]r", "command[-_]r").split()).replace("_", " ") + ")"
_MAKER = f"(?:{MAKERS})"
_MADE = r"(?:made|created|developed|trained|built|designed|engineered|launched|produced)"
_BEFORE = r"(?<![\w\"'“‘«„「『`])"

_LEAKS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_BEFORE}(?:i'm|i am|my name is|you can call me|you're (?:talking|chatting) (?:to|with)|this is) (?:actually |just |called |an? (?:version|instance) of )?(?:\w+'s )?{_ASSISTANT}(?![\w'])",
        rf"{_BEFORE}as (?:chatgpt|claude|gemini|bard|copilot|deepseek)\b(?:,| i )",
        rf"{_BEFORE}(?:as|being) an? (?:[\w-]+ ){{0,3}}(?:ai|a\.i\.|artificial intelligence)(?:[- ](?:language|chat|based|powered|text))*(?:[- ](?:model|assistant|chatbot|program|system|bot))?"
        r"(?:,| (?:i|my|myself)\b| (?:[\w-]+ ){1,6}by )",
        rf"{_BEFORE}as an? (?:[\w-]+ ){{0,2}}language model(?:,| (?:i|my)\b| (?:[\w-]+ ){{1,4}}by )",
        rf"{_BEFORE}(?:i'm|i am) (?:just |only |merely |simply |actually )?an? (?:[\w-]+ ){{0,3}}(?:language model|ai(?: (?:language model|assistant|model|chatbot|program|system))?|"
        r"artificial intelligence|chatbot|virtual assistant)\b(?! (?:researcher|engineer|developer|scientist|student|safety|ethicist|consultant|expert|enthusiast|artist|specialist|lead|company))",
        rf"{_BEFORE}i was (?:\w+ )?{_MADE} (?:and (?:\w+ )?{_MADE} )?by (?:\w+ ){{0,4}}?{_MAKER}(?!\w)",
        rf"{_BEFORE}(?:my|the) (?:creators?|developers?|makers?) (?:is|are|at) {_MAKER}(?!\w)",
        rf"{_BEFORE}(?:my (?:training data|knowledge)(?: \w+)? (?:only )?(?:cuts? off|cutoff|ends|goes up to|was last updated)|my knowledge cut-?off)\b",
        rf"{_BEFORE}(?:ich bin|ich heiße|mein name ist) {_ASSISTANT}(?!\w)",
        rf"{_BEFORE}als (?:eine? |ein |großes |künstliche )*(?:ki|ai|künstliche intelligenz|intelligenz)(?:[- ]?(?:sprachmodell|modell|assistent|assistentin|system|chatbot|basiertes? \w+))?"
        r"(?:,| (?:kann|habe|bin|darf|verfüge|besitze|weiß) ich)",
        rf"{_BEFORE}als (?:ein |großes |einem )*(?:ki-|ai-)?(?:basiertes )?sprachmodell(?:,| (?:kann|habe|bin|darf|verfüge|besitze) ich)",
        rf"{_BEFORE}ich bin (?:nur |lediglich )?(?:eine? )(?:[\w-]+ ){{0,2}}(?:ki|künstliche intelligenz|(?:ki-)?sprachmodell|ki-\w+|chatbot)\b",
        rf"{_BEFORE}ich (?:wurde|bin) von {_MAKER} (?:entwickelt|trainiert|erstellt|geschaffen)",
        rf"{_BEFORE}(?:je suis|je m'appelle|mon nom est) {_ASSISTANT}(?!\w)",
        rf"{_BEFORE}en tant qu(?:'|e )(?:une? |grand )*(?:ia|i\.a\.|intelligence artificielle|assistante? (?:ia|virtuel|d'ia)|modèle (?:de langage|linguistique|d'ia|ia))",
        rf"{_BEFORE}je suis (?:seulement |juste |simplement )?(?:une? )(?:grand )?(?:ia|intelligence artificielle|modèle (?:de langage|linguistique|d'ia)|assistante? (?:ia|virtuel))\b",
        rf"{_BEFORE}j'ai été (?:créée?|développée?|entraînée?|conçue?) par {_MAKER}(?!\w)",
        rf"{_BEFORE}(?:yo )?(?:soy|me llamo|mi nombre es) {_ASSISTANT}(?!\w)",
        rf"{_BEFORE}como (?:un |una |gran )*(?:ia|inteligencia artificial|modelo (?:de lenguaje|de ia|lingüístico)|asistente (?:de ia|virtual|de inteligencia artificial))"
        r"(?:,| (?:no|de|desarrollad[oa]|entrenad[oa]|cread[oa])\b)",
        rf"{_BEFORE}soy (?:solo |sólo |simplemente )?(?:un |una )(?:gran )?(?:ia|inteligencia artificial|modelo (?:de lenguaje|de ia|lingüístico)|asistente (?:de ia|virtual))\b",
        rf"{_BEFORE}(?:fui|he sido) (?:cread|desarrollad|entrenad|diseñad)[oa] por {_MAKER}(?!\w)",
        rf"我(?:是|叫|的名字是)(?:一个|一款|一名|由[^，。]{{1,12}}(?:开发|训练|研发|创建|打造|推出)的)?(?:ai|人工智能|大型?语言模型|大模型|语言模型|智能助手|虚拟助手|{_ASSISTANT})",
        r"作为(?:一个|一款|一名|一种)?(?:由[^，。]{1,12}(?:开发|训练|研发|创建)的)?(?:ai|人工智能|大型?语言模型|语言模型|大模型)(?:助手|语言模型|模型|程序|系统)?(?:，|,|我)",
        rf"我(?:是)?由\s?{_MAKER}(?:公司|团队)?(?:开发|训练|研发|创建|创造|打造)",
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityLeak:
    """Drops answers that say what the teacher is: its name, its maker, or that it is a language model.

    English, German, French, Spanish and Chinese. `names` are further names (of your teacher, your product) that an answer may not give itself.
    What stands right after an opening quotation mark is spoken of, not said.
    """

    name: ClassVar[str] = "identity"
    names: tuple[str, ...] = ()

    def sift(self, rows: Sequence[Row]) -> Sifted:
        own = "|".join(re.escape(normalised(name)) for name in self.names)
        more = (re.compile(rf"{_BEFORE}(?:i'm|i am|my name is|ich bin|je suis|soy|我是|我叫) ?(?:{own})(?!\w)"),) if own else ()
        return sift_each(self.name, rows, lambda row: _leak(row, more))


def _leak(row: Row, more: tuple[re.Pattern[str], ...]) -> Finding | None:
    text = _plain_apostrophes(row.answer.lower())
    for pattern in (*_LEAKS, *more):
        if found := pattern.search(text):
            return Finding(reason="identity", evidence=shortened(found[0], 160))
    return None


# --- the prompt said again -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEcho:
    """Drops answers that say the prompt again.

    That is: an answer that begins with the whole last question, where that has at least `opening_words` words; one that has `span_words` words in a row
    of the system prompt or of `shared`, texts that were sent with every prompt (instructions, worked examples); and one that has `question_words` in a
    row of the rest of the conversation (None: not looked at, for tasks in which an answer rightly quotes at length, such as editing).
    """

    name: ClassVar[str] = "prompt-echo"
    opening_words: int = 6
    span_words: int = 20
    question_words: int | None = 60
    shared: tuple[str, ...] = ()

    def sift(self, rows: Sequence[Row]) -> Sifted:
        common = frozenset(gram for text in self.shared for gram in grams(words(text), self.span_words))
        return sift_each(self.name, rows, lambda row: self._judge(row, common))

    def _judge(self, row: Row, common: frozenset[str]) -> Finding | None:
        said = words(row.answer)
        turns = _turns(row.prompt)
        question = words(turns[-1].content)
        if len(question) >= self.opening_words and said[: len(question)] == question:
            return Finding(reason="prompt-echo", evidence=f"begins with the question: {shortened(' '.join(question))}")
        system = [turn.content for turn in turns if turn.role == "system"]
        rest = [turn.content for turn in turns if turn.role != "system"]
        for texts, length, also in ((system, self.span_words, common), (rest, self.question_words, frozenset[str]())):
            if length is None or len(said) < length:
                continue
            asked = also.union(*(grams(words(text), length) for text in texts))
            if span := next((gram for gram in grams(said, length) if gram in asked), None):
                return Finding(reason="prompt-echo", evidence=f"{length} words of the prompt: {shortened(span)}")
        return None


def _turns(prompt: Prompt) -> tuple[Message, ...]:
    return prompt.messages if prompt.messages is not None else (Message("user", prompt.text or ""),)
