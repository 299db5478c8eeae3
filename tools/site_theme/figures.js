// Figures that move. Each is drawn when it comes near the window; its frames get native controls, which the keyboard moves, too.

function labelled(text, control) {
  const label = document.createElement("label");
  label.append(text, control);
  return label;
}

function controls(place, layout) {
  const menu = ((layout.updatemenus || [])[0] || {}).buttons;
  const sliders = menu ? menu.map(button => button.args[1].sliders[0]) : [layout.sliders[0]];
  const range = document.createElement("input"), shown = document.createElement("output"), choice = document.createElement("select");
  const prefix = sliders[0].currentvalue.prefix;
  Object.assign(range, {type: "range", min: 0, max: sliders[0].steps.length - 1, step: 1, value: sliders[0].active || 0});
  const step = () => sliders[choice.selectedIndex < 0 ? 0 : choice.selectedIndex].steps[range.value];
  function say() {
    shown.textContent = step().label;
    range.setAttribute("aria-valuetext", prefix + step().label);
  }
  function show() {
    say();
    Plotly.animate(place, [step().args[0][0]], {mode: "immediate", transition: {duration: 0}, frame: {duration: 0, redraw: true}});
  }
  const box = document.createElement("div");
  box.className = "figure-controls";
  const slider = labelled(prefix, range);
  slider.append(shown);
  box.append(slider);
  if (menu) {
    menu.forEach(button => choice.add(new Option(button.label)));
    choice.selectedIndex = layout.updatemenus[0].active || 0;
    choice.addEventListener("change", show);
    box.append(labelled("shown: ", choice));
  }
  range.addEventListener("input", show);
  say();
  place.after(box);
}

function draw(place) {
  const figure = JSON.parse(place.nextElementSibling.textContent), frames = figure.frames || [];
  const {sliders, updatemenus, width, ...still} = figure.layout;
  if (updatemenus) still.margin = {...still.margin, t: 60};
  if (place.clientWidth < 520) still.legend = {...still.legend, orientation: "h", yanchor: "top", y: -0.15};  // a phone
  Plotly.newPlot(place, figure.data, still, {responsive: true, displaylogo: false, displayModeBar: false})
    .then(() => Plotly.addFrames(place, frames))
    .then(() => {
      if (frames.length) controls(place, figure.layout);
      place.dataset.drawn = "yes";
    });
}

const near = new IntersectionObserver(seen => seen.filter(entry => entry.isIntersecting).forEach(entry => {
  near.unobserve(entry.target);
  draw(entry.target);
}), {rootMargin: "600px"});
document.querySelectorAll(".figure-place").forEach(place => near.observe(place));

// A formula that is wider than the page scrolls, so the keyboard must reach it.
addEventListener("load", () => window.MathJax?.startup?.promise?.then(() =>
  document.querySelectorAll("mjx-container[display=true]").forEach(formula => {
    if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
  })));
