/* A model's text as DOM: Markdown by marked, formulas by KaTeX, and nothing that DOMPurify does not let through.

   A model's text is hostile until shown otherwise. Its HTML is shown as text, its pictures become links, and what
   remains passes DOMPurify; the page's policy refuses any other way from a string to HTML. */
"use strict";

const drawText = (() => {
  const STRONG = /[A-Za-z\u00c0-\u024f\u0370-\u058f]|([\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff])/;
  const WORD = /[\p{L}\p{N}]/u;
  const MAX_FORMULA = 5000;
  const RIGHT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]/;
  // 48/2=24. Sums in Arabic-Indic digits run from the right and are left alone.
  const SUM = /(?<![\w.])[(-]?\d[\d.,]*(?:[ ]?[-+*/=×÷·^<>≤≥≈()][ ]?[\d.,()-]*)+(?<=[\d)])/g;
  const ALLOWED = {
    ALLOWED_TAGS: "p br hr strong em del a code pre ul ol li blockquote h1 h2 h3 h4 h5 h6 table thead tbody tr th td span div".split(" "),
    ALLOWED_ATTR: ["href", "start", "align", "class", "data-tex", "data-display", "data-language"],
    ADD_URI_SAFE_ATTR: ["start", "align", "data-tex", "data-display", "data-language"],
    ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i, ALLOW_DATA_ATTR: false, RETURN_DOM_FRAGMENT: true,
  };
  const OWN = new Set(["formula", "display", "boxed"]);
  DOMPurify.addHook("uponSanitizeAttribute", (_, given) => { if (given.attrName === "class" && !OWN.has(given.attrValue)) given.keepAttr = false; });
  const escape = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.codePointAt(0)};`);

  const FORMULAS = [
    [/^\$\$([\s\S]+?)\$\$/, true], [/^\\\[([\s\S]+?)\\\]/, true], [/^\\\(([\s\S]+?)\\\)/, false],
    [/^(\\begin\{([a-z]+\*?)\}[\s\S]+?\\end\{\2\})/, true],
    // A dollar sign that touches what it encloses, and no price: "$5 and $6" is text.
    [/^\$(?!\s)((?:\\[\s\S]|[^\\$`\n])+?)(?<!\s)\$(?!\d)/, false],
  ];
  function formula(src) {
    for (const [pattern, display] of FORMULAS) {
      const found = src.match(pattern);
      if (found) return { type: "formula", raw: found[0], tex: found[1].trim(), display };
    }
  }
  /* \boxed{…} outside of a formula, as small models write it; braces inside are matched. */
  function boxed(src) {
    if (!src.startsWith("\\boxed{")) return;
    for (let at = 7, depth = 1; at < src.length; at++) {
      depth += src[at] === "{" ? 1 : src[at] === "}" ? -1 : 0;
      if (!depth) return { type: "boxed", raw: src.slice(0, at + 1), tex: src.slice(7, at).trim() };
    }
  }
  const tag = ({ tex, display }) => `<span class="formula" data-tex="${escape(tex)}"${display ? ' data-display="1"' : ""}></span>`;
  const marked_ = new marked.Marked({
    gfm: true, breaks: true,
    extensions: [
      {
        name: "formula", level: "block",
        start: (src) => src.match(/(?:^|\n) {0,3}(?:\$\$|\\\[|\\begin\{)/)?.index,
        tokenizer(src) {
          const indent = src.match(/^ {0,3}(?=\$\$|\\\[|\\begin\{)/);
          const found = indent && formula(src.slice(indent[0].length));
          const rest = found && src.slice(indent[0].length + found.raw.length).match(/^[ \t]*(?:\n+|$)/);
          if (rest) return { ...found, raw: indent[0] + found.raw + rest[0] };
        },
        renderer: (token) => `<div class="display">${tag(token)}</div>`,
      },
      { name: "boxed", level: "inline", start: (src) => src.match(/\\boxed\{/)?.index, tokenizer: boxed,
        renderer: ({ tex }) => /[\\^_{}]/.test(tex) ? `<span class="boxed">${tag({ tex })}</span>` : `<span class="boxed">${escape(tex)}</span>` },
      { name: "formula", level: "inline", start: (src) => src.match(/\$|\\[([]|\\begin\{/)?.index, tokenizer: formula, renderer: tag },
    ],
    tokenizer: {
      // A star between letters or digits multiplies: 3*4*5 has no emphasis.
      emStrong(src, masked, before) {
        const run = src.match(/^\*+/)?.[0];
        return run && before && WORD.test(before) && WORD.test(src[run.length] ?? "") ? { type: "text", raw: run, text: run, escaped: false } : false;
      },
    },
    renderer: {
      html: ({ text }) => escape(text),
      image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
      checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
      code: ({ text, lang }) => `<pre data-language="${escape((lang ?? "").match(/^\S*/)[0])}"><code>${escape(text)}</code></pre>`,
    },
  });

  function element(name, className, text) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function drawFormula(node, words) {
    const { tex, display } = node.dataset;
    node.dir = "ltr";
    node.removeAttribute("data-tex");
    try {
      if (tex.length > MAX_FORMULA) throw new Error(`${tex.length} characters`);
      katex.render(tex, node, { displayMode: Boolean(display), throwOnError: true, strict: "ignore", trust: false, maxSize: 20, maxExpand: 500 });
    } catch (error) {
      node.replaceChildren(element("code", "", tex));
      node.title = error.message;
    }
    if (!display) return;
    node.tabIndex = 0; // a wide one scrolls
    node.setAttribute("role", "group");
    node.setAttribute("aria-label", words.formula);
  }
  function frameCode(pre, words) {
    const frame = element("figure", "code"), head = element("figcaption", "", pre.dataset.language || words.code);
    const copy = element("button", "", words.copy);
    copy.type = "button";
    copy.setAttribute("aria-label", words.copyCode);
    copy.dataset.copies = "code";
    head.append(copy);
    frame.dir = "ltr";
    pre.tabIndex = 0;
    pre.setAttribute("role", "group");
    pre.setAttribute("aria-label", pre.dataset.language || words.code);
    pre.replaceWith(frame);
    frame.append(head, pre);
  }
  function frameTable(table, words) {
    const frame = element("div", "table");
    frame.tabIndex = 0;
    frame.setAttribute("role", "group");
    frame.setAttribute("aria-label", words.table);
    table.replaceWith(frame);
    frame.append(table);
  }
  /* The text of a block that says which way it runs: neither code nor formulas do. */
  function speech(block) {
    if (!block.querySelector("code, .formula")) return block.textContent;
    const copy = block.cloneNode(true);
    for (const node of copy.querySelectorAll("code, pre, .formula")) node.remove();
    return copy.textContent;
  }
  function direct(root) {
    for (const block of root.querySelectorAll("p, h1, h2, h3, h4, h5, h6, li, th, td")) {
      // A block of digits and signs alone runs as its surroundings do.
      if (STRONG.test(speech(block))) block.dir = "auto";
    }
    for (const block of root.querySelectorAll("ul, ol, blockquote, table")) {
      const found = speech(block).match(STRONG);
      if (found) block.dir = found[1] ? "rtl" : "ltr";
    }
  }

  /* Among Arabic words a sum runs from left to right, as formulas do. */
  function isolateSums(root) {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), texts = [];
    while (walker.nextNode()) if (!walker.currentNode.parentElement?.closest("code, .formula")) texts.push(walker.currentNode);
    for (const text of texts) {
      const parts = [];
      let end = 0;
      for (const { 0: sum, index } of text.data.matchAll(SUM)) {
        const node = element("bdi", "", sum);
        node.dir = "ltr";
        parts.push(text.data.slice(end, index), node);
        end = index + sum.length;
      }
      if (parts.length) text.replaceWith(...parts, text.data.slice(end));
    }
  }

  /** Show a model's text in an element, in place of what is there. */
  function draw(target, source, words) {
    const part = DOMPurify.sanitize(marked_.parse(source), ALLOWED);
    direct(part);
    if (target.dir === "rtl" || RIGHT.test(source)) isolateSums(part);
    for (const node of part.querySelectorAll("code")) node.dir = "ltr";
    for (const node of part.querySelectorAll(".formula")) drawFormula(node, words);
    for (const node of part.querySelectorAll("pre")) frameCode(node, words);
    for (const node of part.querySelectorAll("table")) frameTable(node, words);
    for (const node of part.querySelectorAll("a")) Object.assign(node, { target: "_blank", rel: "noopener noreferrer nofollow" });
    target.replaceChildren(part);
  }
  draw.direction = (text) => (text.match(STRONG)?.[1] ? "rtl" : "ltr");
  return draw;
})();
